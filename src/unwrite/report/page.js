// Which writer is looked at? Every panel follows, and the address says it, so that it can be sent to someone.
(() => {
  "use strict";
  const links = [...document.querySelectorAll("a[data-pick]")];
  const parts = [...document.querySelectorAll("[data-writer]")];
  const choice = document.getElementById("choice");
  const said = document.getElementById("said");
  const names = [...choice.options].map((option) => option.value);

  const wanted = () => {
    try {
      const name = decodeURIComponent(location.hash.slice(1));
      return names.includes(name) ? name : choice.value;
    } catch {
      return choice.value;
    }
  };
  const show = (name) => {
    for (const part of parts) part.hidden = part.dataset.writer !== name;
    for (const link of links) {
      if (link.dataset.pick === name) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    choice.value = name;
    said.textContent = `All panels show ${name}.`;
  };
  const pick = (name) => {
    history.replaceState(null, "", `#${encodeURIComponent(name)}`);
    show(name);
  };

  document.documentElement.classList.add("scripted");
  for (const link of links) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      pick(link.dataset.pick);
    });
    link.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const next = step && links[links.indexOf(link) + step];
      if (!next) return;
      event.preventDefault();
      next.focus();
      pick(next.dataset.pick);
    });
  }
  choice.addEventListener("change", () => pick(choice.value));
  addEventListener("hashchange", () => show(wanted()));
  addEventListener("beforeprint", () => parts.forEach((part) => (part.hidden = false)));
  addEventListener("afterprint", () => show(wanted()));
  if (names.length) show(wanted());
})();
