// Which writer is looked at, and by which number? The picture, the panel, the table and the address follow.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  // Text only ever becomes text: nothing here takes a string for markup, and the content policy would not let it.
  const made = (space) => (tag, attributes = {}, ...parts) => {
    const one = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
    one.append(...parts);
    return one;
  };
  const html = made("http://www.w3.org/1999/xhtml");
  const svg = made(SVG);
  const said = (value, sign = false) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size >= 1000 ? value.toPrecision(3) : size >= 100 ? value.toFixed(0) : value.toFixed(2);
    return sign && value > 0 ? `+${text}` : text;
  };
  const ratio = (value, sign) =>
    Math.abs(value) >= 100 ? `beyond ${value < 0 ? "−" : ""}100` : said(value, sign);
  const between = ([low, value, high], sign = false) =>
    `${ratio(value, sign)}${low === null ? " (no interval)" : ` [${ratio(low, sign)}, ${ratio(high, sign)}]`}`;

  // Numbers come in hundredths.
  const whole = (x) => (Array.isArray(x) ? x.map(whole) : x === null ? null : x / 100);
  // A band comes in steps along it, its ends as how far they are from its middle.
  const summed = (row) => {
    let last = 0;
    return row.map((step) => (step === null ? null : (last += step)));
  };
  const ends = (band) => {
    const [below, middle, above] = band.map(summed);
    const end = (by, sign) => middle.map((value, k) => (value === null || by[k] === null ? null : value + sign * by[k]));
    return [end(below, -1), middle, end(above, 1)];
  };
  const numbers = (name) => {
    const { from, begin, level, kept, ordinary, acts, caused, given } = data.writers[name];
    const own = acts && { nodes: acts.nodes.map((i) => data.nodes[i]), rows: whole(acts.rows), more: acts.more, sum: whole(acts.sum) };
    const parts = { level: level && ends(level), kept: kept && ends(kept), ordinary, given };
    for (const [key, part] of Object.entries(parts)) if (part) parts[key] = whole(part);
    return { from, begin, caused, acts: own, ...parts };
  };

  // The picture: a grid in which one cell is reached by Tab, and the arrow keys move.
  const lines = [...$("picture").tBodies[0].rows].map((row) => [...row.cells].slice(1));
  const cells = lines.flat().filter((cell) => cell.id);
  const cellOf = new Map(cells.map((cell) => [cell.id, cell]));
  const place = (cell) => {
    const row = lines.findIndex((line) => line.includes(cell));
    return [row, lines[row].indexOf(cell)];
  };
  const nearest = (row, column) => {
    const there = (lines[row] || []).filter((cell) => cell.id);
    const away = (cell) => Math.abs(lines[row].indexOf(cell) - column);
    return there.sort((a, b) => away(a) - away(b))[0];
  };
  const moved = (cell, key, whole) => {
    const [row, column] = place(cell);
    const beside = (step) => {
      const line = lines[row].filter((one) => one.id);
      return line[line.indexOf(cell) + step];
    };
    const page = 8;
    const to = {
      ArrowLeft: () => beside(-1),
      ArrowRight: () => beside(1),
      ArrowUp: () => nearest(row - 1, column),
      ArrowDown: () => nearest(row + 1, column),
      PageUp: () => nearest(Math.max(0, row - page), column),
      PageDown: () => nearest(Math.min(lines.length - 1, row + page), column),
      Home: () => (whole ? cells[0] : nearest(row, 0)),
      End: () => (whole ? cells.at(-1) : nearest(row, lines[row].length)),
    }[key];
    return to && to();
  };

  let measure = data.measures[0];
  const colour = () => {
    const down = measure.values.some((value) => value < 0);
    for (const cell of cells) {
      const value = measure.values[cell.dataset.i];
      const part = Math.max(-1, Math.min(1, value / measure.limit));
      const step = value === null ? "none" : `${part < 0 ? "d" : "u"}${Math.round(10 * Math.abs(part))}`;
      cell.className = [step, ...["special", "unsure"].filter((word) => cell.classList.contains(word))].join(" ");
      cell.firstChild.textContent = value === null ? "" : said(value);
      const found = kindOf.get(cell.id);
      const says = `${cell.id}: ${measure.name} ${value === null ? "not measured" : said(value)}, ${found}`;
      cell.title = says;
      cell.setAttribute("aria-label", says);
    }
    $("says").textContent = `${measure.name}: ${measure.says}`;
    $("least").textContent = down ? said(-measure.limit) : "0";
    $("most").textContent = said(measure.limit);
    document.querySelector(".legend").classList.toggle("upward", !down);
  };

  // Charts of one writer.
  const way = (one) => {
    const [wide, high] = [Math.max(280, $("way").clientWidth), 190];
    const [left, right, top, bottom] = [38, 52, 8, 22];
    const last = data.places.length - 1;
    const begin = one.from ?? one.begin ?? 0;
    const band = one.ordinary?.[0] ?? [];
    // The frame is that of what survives; a level, which may be a hundred times as much, does not make it small.
    const kept = [0, 1, ...(one.kept?.flat() ?? []), ...band].filter((v) => v !== null);
    const level = (one.level?.[1] ?? []).filter((v) => v !== null);
    const within = (most, v) => Math.max(-most, Math.min(most, v));
    const frame = [...kept.map((v) => within(4, v)), ...level.map((v) => within(2, v))];
    const [low, up] = [Math.min(...frame), Math.max(...frame)];
    const x = (i) => left + ((wide - left - right) * (i - begin)) / Math.max(1, last - begin);
    const y = (v) => top + (high - top - bottom) * (1 - (Math.max(low, Math.min(up, v)) - low) / (up - low));
    const chart = svg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img" });
    for (const tick of [...new Set([low, 0, 1, up])].filter((v) => v === 0 || v === 1 || Math.abs(v) > 1.4)) {
      chart.append(svg("path", { class: tick ? "grid" : "axis", d: `M${left} ${y(tick)}H${wide - right}` }));
      chart.append(svg("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, said(tick).replace(".00", "")));
    }
    const every = Math.max(1, Math.ceil((last - begin + 1) / 6));
    for (let i = begin; i <= last; i += every) {
      if (last - i < every / 2 && i !== begin) continue;
      chart.append(svg("text", { x: x(i), y: high - 5, "text-anchor": "middle" }, data.places[i].replace("resid_", "")));
    }
    const draw = (name, from, [less, middle, more], words) => {
      const points = middle.map((v, i) => [x(from + i), v, i]).filter(([, v]) => v !== null);
      const edge = (side) => points.filter(([, , i]) => side[i] !== null).map(([at, , i]) => `${at} ${y(side[i])}`);
      const area = [...edge(more), ...edge(less).reverse()];
      if (area.length) chart.append(svg("polygon", { class: `area ${name}`, points: area.join(" ") }));
      chart.append(svg("polyline", { class: `line ${name}`, points: points.map(([at, v]) => `${at} ${y(v)}`).join(" ") }));
      for (const [at, v, i] of points) {
        const title = svg("title", {}, `${words}, ${data.places[from + i]}: ${between([less[i], v, more[i]])}`);
        chart.append(svg("circle", { class: `hit ${name}`, cx: at, cy: y(v), r: 6 }, title));
      }
    };
    if (one.level) draw("level", one.from, one.level, "level");
    if (one.kept) draw("kept", one.begin, one.kept, "survival");
    (one.ordinary ?? []).forEach(([less, middle, more], i) => {
      if (middle === null) return;
      const at = wide - right + 12 + 16 * i;
      const title = svg("title", {}, `ordinary writes (${data.controls[i]}): ${between([less, middle, more])}`);
      if (less !== null) chart.append(svg("path", { class: "ordinary", d: `M${at} ${y(less)}V${y(more)}` }, title));
      chart.append(svg("path", { class: "ordinary middle", d: `M${at - 5} ${y(middle)}h10` }));
    });
    const end = one.kept?.map((row) => row.at(-1));
    chart.setAttribute("aria-label", end ? `survival at the end ${between(end)}` : "level along the write");
    const key = html("p", { class: "quiet" }, html("span", { class: "swatch level" }, "level"), " (median, middle half of positions)");
    if (one.kept) key.append("; ", html("span", { class: "swatch kept" }, "survival"), " of the write itself [95 %]; grey: 5 % to 95 % of ordinary writes at the end (", data.controls.join(", "), ")");
    if ([...kept, ...level].some((v) => v < low || v > up)) key.append("; what lies beyond the frame is drawn at its edge");
    return [chart, key];
  };

  const bars = (acts) => {
    if (!acts?.nodes.length) return ["Nobody, as far as was measured."];
    const most = Math.max(...acts.rows.flat().map(Math.abs)) || 1;
    const x = (value) => 100 + (98 * Math.max(-most, Math.min(most, value))) / most;
    const table = html("table", { class: "acts" });
    acts.nodes.forEach((node, i) => {
      const [value, low, high] = acts.rows[i];
      const doubt = !(low > 0 || high < 0);
      const [from, to] = [Math.min(x(value), 100), Math.max(x(value), 100)];
      const name = `bar${value > 0 ? " up" : ""}${doubt ? " doubt" : ""}`;
      const drawn = svg(
        "svg", { viewBox: "0 0 200 14", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("path", { class: "zero", d: "M100 0V14" }),
        svg("rect", { class: name, x: from, y: 3, width: Math.max(0.5, to - from), height: 8 }),
        low === null ? "" : svg("path", { class: "error", d: `M${x(low)} 7H${x(high)}` }),
      );
      const words = `${between([low, value, high], true)}${doubt ? " ?" : ""}`;
      table.append(html("tr", {}, html("th", { scope: "row" }, html("a", { href: `#${node}` }, node)), html("td", {}, drawn), html("td", {}, words)));
    });
    return acts.more ? [table, html("p", { class: "quiet" }, `${acts.more} more: ${ratio(acts.sum, true)} in all`)] : [table];
  };

  const given = (one) => {
    if (!one.given) return [html("p", { class: "quiet" }, "No prompt was asked about it.")];
    const size = data.prompts.map((_, p) => Math.max(...one.given.map((row) => Math.abs(row[p] ?? 0))));
    const order = size.map((_, p) => p).sort((a, b) => size[b] - size[a]).slice(0, 8);
    const head = html("tr", {}, ...["prompt", ...data.readings].map((word) => html("th", { scope: "col" }, word)));
    const rows = order.map((p) => {
      const title = html("th", { scope: "row", title: data.prompts[p] }, data.prompts[p].replace(/^.*?prompt \d+: /, ""));
      return html("tr", {}, title, ...one.given.map((row) => html("td", {}, said(row[p], true))));
    });
    const left = data.prompts.length - order.length;
    const note = `logits; ${left > 0 ? `${left} more prompts moved less; ` : ""}total: executed, its write replaced`;
    return [html("table", { class: "gives" }, html("thead", {}, head), html("tbody", {}, ...rows)), html("p", { class: "quiet" }, note)];
  };

  const quoted = (says) => {
    const begin = says.lastIndexOf("[");
    return html("q", {}, says.slice(0, begin), html("b", {}, says.slice(begin + 1, -1)));
  };
  const where = (name) => {
    const whole = $(`of-${name}`);
    const places = (data.writers[name].where ?? []).map(([size, says]) =>
      html("li", {}, size === null ? "" : `×${said(size / 100)} `, quoted(says)),
    );
    const note = html("p", { class: "quiet" }, "Where it is largest, in times its median norm, at most once in a prompt; the last token is where it is written:");
    const largest = [note, html("ol", { class: "places" }, ...places)];
    if (data.writers[name].looks) {
      const [says, met] = data.writers[name].looks;
      const from = met.flatMap(([token, share]) => [html("q", {}, token), ` ${share} %, `]);
      largest.push(html("p", { class: "looks" }, "At ", quoted(says), " it brings from ", ...from, "by pattern × ‖v W_O‖"));
    }
    if (whole) {
      const link = html("a", { href: `#${whole.id}` }, whole.querySelector("summary").textContent);
      link.addEventListener("click", () => (whole.open = true));
      return [...largest, html("p", {}, "Verified closely, alone and so without q: ", link), whole.querySelector(".strips").cloneNode(true)];
    }
    return [...largest, html("p", { class: "quiet" }, `Token by token: unwrite verify MODEL ${name} --text …`)];
  };

  // The table: rows that were folded come out, and are turned over.
  const table = document.querySelector("#writers table");
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...document.querySelectorAll("#writers tbody tr")];
  const nameOf = (row) => row.cells[0].textContent;
  const kindOf = new Map(rows.map((row) => [nameOf(row), row.dataset.kind]));
  const rowOf = new Map(rows.map((row) => [nameOf(row), row]));
  let sorted = { column: -1, down: true };
  let first = 0;
  const number = (text) => (text.startsWith("beyond") ? (text.includes("−") ? -101 : 101) : Number.parseFloat(text));
  const order = (a, b) => {
    const [left, right] = [a, b].map((row) => row.cells[sorted.column].textContent);
    const [x, y] = [number(left), number(right)];
    const missing = Number(left === "–") - Number(right === "–");
    if (missing) return missing;
    const way = sorted.down ? -1 : 1;
    return way * (Number.isNaN(x) || Number.isNaN(y) ? right.localeCompare(left, undefined, { numeric: true }) : x - y);
  };
  const matching = () => {
    const words = $("search").value.trim().toLowerCase();
    const pressed = [...$("filters").querySelectorAll("[aria-pressed=true]")].map((one) => one.dataset.kind);
    const found = rows.filter(
      (row) => (!pressed.length || pressed.includes(row.dataset.kind)) && row.textContent.toLowerCase().includes(words),
    );
    return sorted.column < 0 ? found : found.sort(order);
  };
  const list = () => {
    const found = matching();
    first = Math.max(0, Math.min(first, found.length - 1));
    first -= first % data.open;
    const shown = found.slice(first, first + data.open);
    for (const row of shown) [...row.cells].forEach((cell, k) => k && (cell.dataset.name = heads[k].textContent));
    table.tBodies[0].replaceChildren(...shown);
    $("which").textContent = found.length ? `${first + 1} to ${first + shown.length} of ${found.length}` : "none";
    $("before").disabled = first === 0;
    $("after").disabled = first + data.open >= found.length;
  };
  const again = () => {
    first = 0;
    list();
  };

  // What is shown, as a file. A cell that a spreadsheet would take for a formula is made text.
  const safe = (value) => {
    if (typeof value === "number") return String(value);
    const text = value ?? "";
    return `"${(/^[=+\-@\t\r＝＋－＠]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  };
  const record = (row) => {
    const i = data.nodes.indexOf(nameOf(row));
    const texts = heads.map((head, k) => [head.textContent, row.cells[k].textContent]);
    return { ...Object.fromEntries(texts), ...Object.fromEntries(data.measures.map((one) => [one.name, one.values[i]])) };
  };
  const keep = (text, name, type) => {
    const link = html("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const csv = () => {
    const found = matching().map(record);
    if (!found.length) return;
    const text = [Object.keys(found[0]), ...found.map((one) => Object.values(one))].map((row) => row.map(safe).join(","));
    keep(`${text.join("\r\n")}\r\n`, "writers.csv", "text/csv");
  };
  const json = () => {
    const found = matching().map((row) => ({ ...record(row), numbers: numbers(nameOf(row)) }));
    const { places, readings, prompts } = data;
    keep(JSON.stringify({ places, readings, prompts, writers: found }, null, 1), "writers.json", "application/json");
  };

  // One writer is chosen; everything follows.
  let chosen;
  const show = (name) => {
    chosen = name;
    const one = numbers(name);
    for (const cell of cells) {
      const own = cell.id === name;
      cell.tabIndex = own ? 0 : -1;
      cell.setAttribute("aria-selected", String(own));
    }
    for (const row of rows) row.classList.toggle("chosen", nameOf(row) === name);
    const word = kindOf.get(name);
    $("who").textContent = word ? `${name}: ${word}` : name;
    const term = [...$("words").querySelectorAll("dt")].find((dt) => dt.textContent === word);
    $("means").textContent = term ? term.nextElementSibling.textContent : "";
    const told = rowOf.get(name) ? [...rowOf.get(name).cells].slice(1) : [];
    const pairs = told.map((cell, k) => html("div", {}, html("dt", {}, `${heads[k + 1].textContent} `), html("dd", {}, cell.textContent)));
    $("numbers").replaceChildren(...pairs);
    $("way").replaceChildren(...way(one));
    $("acting").textContent = one.caused ? "Who acts on it: writes along it because it is there, a − b [95 %]" : "Who writes against it: share [±2 standard errors]";
    $("acts").replaceChildren(...bars(one.acts));
    $("gives").replaceChildren(...given(one));
    $("text").replaceChildren(...where(name));
    for (const figure of document.querySelectorAll("#truth .scatter")) {
      const { reading, limit } = figure.dataset;
      const at = (value) => 112 * Math.max(-1, Math.min(1, value / limit));
      const [across, up] = [one.given?.[data.readings.indexOf(reading)], one.given?.at(-1)];
      const dots = (across ?? []).map((value, p) => {
        const title = svg("title", {}, `${name}, ${data.prompts[p]}: ${said(value, true)}, really ${said(up[p], true)}`);
        return svg("circle", { cx: 120 + at(value), cy: 120 - at(up[p]), r: 4 }, title);
      });
      figure.querySelector(".chosen").replaceChildren(...dots);
    }
    if ($("ringed")) $("ringed").textContent = name;
  };
  const pick = (name) => {
    history.replaceState(null, "", `#${encodeURIComponent(name)}`);
    show(name);
  };
  const wanted = () => {
    try {
      const name = decodeURIComponent(location.hash.slice(1));
      return cellOf.has(name) ? name : undefined;
    } catch {
      return undefined;
    }
  };

  document.documentElement.classList.add("scripted");
  table.classList.add("wordy");
  $("rest")?.remove();
  heads.forEach((head, column) => {
    const button = html("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      sorted = { column, down: sorted.column === column ? !sorted.down : true };
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      again();
    });
  });
  for (const cell of cells) cell.addEventListener("click", () => (pick(cell.id), cell.focus()));
  $("picture").addEventListener("keydown", (event) => {
    const to = event.target.id && moved(event.target, event.key, event.ctrlKey);
    if (!to) return;
    event.preventDefault();
    to.focus();
    pick(to.id);
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    const name = link && decodeURIComponent(link.hash.slice(1));
    if (!cellOf.has(name)) return;
    event.preventDefault();
    pick(name);
    $("panel").scrollIntoView({ block: "nearest" });
  });
  $("measure").addEventListener("change", () => ((measure = data.measures[$("measure").value]), colour()));
  $("search").addEventListener("input", again);
  $("filters").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    again();
  });
  $("before").addEventListener("click", () => ((first -= data.open), list()));
  $("after").addEventListener("click", () => ((first += data.open), list()));
  $("csv").addEventListener("click", csv);
  $("json").addEventListener("click", json);
  addEventListener("resize", () => requestAnimationFrame(() => show(chosen)));
  addEventListener("hashchange", () => wanted() && show(wanted()));
  colour();
  list();
  show(wanted() ?? nameOf(rows[0]));
})();
