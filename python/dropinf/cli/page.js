"use strict";
// The data only ever becomes text nodes and properties: nothing in it is parsed as markup.
(() => {
  const SIDES = ["proponents", "opponents"];
  const MANY = 8; // queries: beyond so many there is a search box
  const LINES = 5, LETTERS = 320, SPARE = 40; // of a text that is not expanded
  const COMMON = new Set(
    ("a about after all also am an and any are as at be been but by can could did do does for from had has have he " +
      "her his how i if in into is it its me more my no not of on or our out she so than that the their them then " +
      "there these they this to up was we were what when where which who will with would you your").split(" ")
  );
  const byId = (id) => document.getElementById(id);
  const { rows, queries } = JSON.parse(byId("data").textContent);
  const segmenter = Intl.Segmenter && new Intl.Segmenter("en", { granularity: "word" });
  const title = document.title;
  const count = (number) => number.toLocaleString("en");
  const fold = (text) => text.normalize("NFKC").toLowerCase();
  const wellFormed = (text) => text.replace(/\p{Cs}/gu, "\ufffd");
  const largest = (results) => results.reduce((most, [score]) => Math.max(most, Math.abs(score)), 0);
  const make = (tag, properties, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const flip = (button, state) => {
    const on = button.getAttribute(state) === "false";
    button.setAttribute(state, on);
    return on;
  };
  const span = (className, ...children) => make("span", { className }, ...children);

  /** Control characters as their pictures, so that none goes unseen. */
  const visible = (text) =>
    wellFormed(text)
      .replace(/\r\n/g, "\n")
      .replace(/[\0-\x08\x0b-\x1f\x7f]/g, (c) => String.fromCharCode(c === "\x7f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));

  const words = (text) => (segmenter ? [...segmenter.segment(text)] : []);
  const contentWords = (text) => {
    const found = words(text).filter((word) => word.isWordLike).map((word) => fold(word.segment));
    return new Set(found.filter((word) => !COMMON.has(word)));
  };

  /** Put a text into a node, with the words that are shared with the query marked. */
  const fill = (node, text, shared) => {
    const parts = new DocumentFragment();
    let plain = "";
    for (const { segment, isWordLike } of shared.size ? words(text) : [{ segment: text }]) {
      if (isWordLike && shared.has(fold(segment))) {
        parts.append(plain, make("mark", {}, segment));
        plain = "";
      } else plain += segment;
    }
    parts.append(plain);
    node.replaceChildren(parts);
  };

  /** Put the words of a text into a node, up to the length that is shown, each shaded by its share. */
  const shade = (node, shown, words, most) => {
    const parts = new DocumentFragment();
    let left = shown.length;
    for (const [raw, share] of words) {
      const piece = visible(raw).slice(0, left);
      left -= piece.length;
      if (!piece) continue;
      const word = span(share < 0 ? "word raises" : "word lowers", piece);
      word.style.setProperty("--share", most ? Math.abs(share) / most : 0);
      word.title = signed(share);
      parts.append(word);
    }
    node.replaceChildren(parts);
  };

  const passage = (raw, show) => {
    const text = visible(raw), body = make("div", { className: "text" });
    let start = text.split("\n", LINES).join("\n");
    if (start.length > LETTERS) start = start.slice(0, LETTERS).replace(/\s+\S{0,40}$|[\ud800-\udbff]$/, "");
    if (text.length - start.length <= SPARE) start = text;
    const put = (shown) => {
      show(body, shown);
      if (shown !== text) body.append("\u2026");
    };
    put(start);
    if (start === text) return [body];
    const label = `Show all ${count(text.length)} characters`;
    const more = make("button", { type: "button", className: "more" }, label);
    more.setAttribute("aria-expanded", false);
    more.onclick = () => {
      const whole = flip(more, "aria-expanded");
      put(whole ? text : start);
      more.textContent = whole ? "Show less" : label;
    };
    return [body, more];
  };

  // Pixels are shown as such where they are few; a photograph, which is made smaller, is smoothed.
  const picture = (src, id) => {
    const onload = ({ target }) => target.classList.toggle("photo", target.naturalWidth > 160);
    const alt = `Image of ${visible(id.slice(0, 200))}`;
    return make("img", { alt, decoding: "async", loading: "lazy", onload, src });
  };
  const name = (id) => {
    const node = span("id", make("bdi", {}, visible(id.slice(0, 200)) || "(no id)"));
    node.title = visible(id.slice(0, 999));
    return node;
  };

  /** One number of decimals for a whole side, so that its scores line up. */
  const scoreFormat = (most) => (score) => {
    const decimals = Math.max(0, 2 - Math.floor(Math.log10(most || 1))), size = Math.abs(score);
    const plain = decimals < 6 && most < 1e7 && (size === 0 || Number(size.toFixed(decimals)) > 0);
    const digits = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
    const text = plain ? size.toLocaleString("en", digits) : size.toExponential(2).replace("e+", "e");
    return (score > 0 ? "+" : score < 0 ? "\u2212" : "") + text.replace("-", "\u2212");
  };

  const signed = (number) => (number > 0 ? "+" : "") + number.toPrecision(4).replaceAll("-", "\u2212");

  const card = ([score, , exact, words], item, rank, format, most, shared, strongest) => {
    const part = make("i", { className: score < 0 ? "negative" : score > 0 ? "positive" : "" });
    part.style.width = `${most ? (100 * Math.abs(score)) / most : 0}%`;
    const number = make("b", { className: "score", title: String(score) }, format(score));
    const line = [span("rank", String(rank)), number, name(item.id), span("position", `position ${item.position}`)];
    if (words) line.splice(2, 0, span("exact", `exact ${format(exact)}`));
    const show = (node, text) => (words ? shade(node, text, words, strongest) : fill(node, text, shared));
    const body = make("div", { className: "body" }, make("p", { className: "line" }, ...line), span("bar", part));
    if (item.text !== null) body.append(...passage(item.text, show));
    else if (item.image === null) body.append(make("p", { className: "soft" }, "Neither text nor image is known."));
    return make("li", { className: "card" }, ...(item.image === null ? [] : [picture(item.image, item.id)]), body);
  };

  const cards = { proponents: [], opponents: [] };
  let selected = -1, shown = queries.map((_, i) => i);

  const folded = new Map();
  const matches = (item, wanted) => {
    if (!folded.has(item)) folded.set(item, fold([item.id, item.position ?? "", item.text ?? ""].join("\n")));
    return folded.get(item).includes(wanted);
  };

  const filter = () => {
    const wanted = fold(byId("filter").value.trim());
    const told = SIDES.map((side) => {
      for (const { node, item } of cards[side]) node.hidden = !matches(item, wanted);
      const all = cards[side].length, left = cards[side].filter(({ node }) => !node.hidden).length;
      const label = left === all ? count(all) : `${count(left)} of ${count(all)}`;
      for (const place of document.querySelectorAll(`[data-count=${side}]`)) place.textContent = label;
      const empty = document.querySelector(`#${side} .empty`);
      empty.hidden = left > 0;
      empty.textContent = all ? "None matches the filter." : "None.";
      return `${label} ${side}`;
    });
    return told.join(", ");
  };

  const select = (index) => {
    if (index === selected) return;
    const query = queries[index], subject = byId("subject"), shared = contentWords(query.text ?? "");
    if (selected >= 0) links[selected].removeAttribute("aria-current"), (links[selected].tabIndex = -1);
    selected = index;
    links[index].setAttribute("aria-current", "true");
    links[index].tabIndex = 0;
    links[index].parentNode.scrollIntoView({ block: "nearest" });
    byId("name").replaceChildren(name(query.id));
    byId("place").textContent = `${count(index + 1)} of ${count(queries.length)}`;
    document.title = `${visible(query.id.slice(0, 80))} \u00b7 ${title}`;
    subject.replaceChildren(...(query.image === null ? [] : [picture(query.image, query.id)]));
    if (query.text !== null) subject.append(make("div", { className: "text" }, visible(query.text)));
    subject.scrollTop = 0;
    subject.tabIndex = subject.scrollHeight > subject.clientHeight ? 0 : -1;
    const shares = SIDES.flatMap((side) => query[side].flatMap(([, , , words]) => words ?? []));
    const strongest = shares.reduce((most, [, share]) => Math.max(most, Math.abs(share)), 0);
    byId("shared").hidden = !shared.size || shares.length > 0;
    byId("legend").hidden = !shares.length;
    const most = Math.max(...SIDES.map((side) => largest(query[side])));
    for (const side of SIDES) {
      const format = scoreFormat(largest(query[side])), list = document.querySelector(`#${side} ol`);
      cards[side] = query[side].map((found, i) => {
        const item = rows[found[1]];
        return { item, node: card(found, item, i + 1, format, most, shared, strongest) };
      });
      list.replaceChildren(...cards[side].map(({ node }) => node));
      list.classList.toggle("gallery", cards[side].every(({ item }) => item.image !== null && item.text === null));
    }
    byId("status").textContent = `Query ${count(index + 1)} of ${count(queries.length)}: ${filter()}`;
    scrollTo(0, 0);
  };

  const address = (query) => "#q=" + encodeURIComponent(wellFormed(query.id));
  const places = new Map(queries.map((query, i) => [wellFormed(query.id), i]));
  const follow = () => {
    let wanted = location.hash.replace(/^#(q=)?/, "");
    try {
      wanted = decodeURIComponent(wanted);
    } catch {} // no address of this page's making: it is shown as it is
    const at = location.hash ? places.get(wanted) : 0;
    byId("notice").textContent = `This page has no query \u201c${visible(wanted)}\u201d.`;
    byId("notice").hidden = at !== undefined;
    if (at !== undefined || selected < 0) select(at ?? 0);
  };

  const move = (step) => {
    const at = shown.indexOf(selected), next = shown[at < 0 ? (step > 0 ? 0 : shown.length - 1) : at + step];
    if (next === undefined) return;
    const inList = byId("list").contains(document.activeElement);
    select(next);
    location.replace(address(queries[next]));
    if (inList) links[next].focus({ preventScroll: true });
  };

  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      const area = make("textarea", { value: text });
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      return done;
    }
  };
  const whole = ({ id, text, image, ...sides }) => {
    const result = ([score, row, exact, words]) => ({ ...rows[row], score, exact, words });
    const results = SIDES.map((side) => [side, sides[side].map(result)]);
    return JSON.stringify({ id, text, image, ...Object.fromEntries(results) }, null, 2);
  };

  const links = queries.map((query) => {
    const link = make("a", { href: address(query), tabIndex: -1 }, name(query.id));
    const start = query.text === null ? "" : visible(query.text.slice(0, 200));
    if (start) link.append(span("start", start));
    if (query.image !== null) link.prepend(picture(query.image, query.id));
    return link;
  });
  for (const link of links) byId("list").append(make("li", {}, link));
  byId("list").onclick = () => byId("menu").setAttribute("aria-expanded", false);
  byId("menu").append(` (${count(links.length)})`);
  byId("menu").onclick = () => flip(byId("menu"), "aria-expanded");
  byId("search").hidden = links.length <= MANY;
  byId("search").oninput = () => {
    const wanted = fold(byId("search").value.trim());
    shown = [...links.keys()].filter((i) => !(links[i].parentNode.hidden = !matches(queries[i], wanted)));
    byId("nothing").hidden = shown.length > 0;
    byId("status").textContent = `${count(shown.length)} of ${count(links.length)} queries`;
  };
  byId("filter").oninput = () => (byId("status").textContent = filter());
  byId("shared").onclick = () => byId("sides").classList.toggle("unmarked", !flip(byId("shared"), "aria-pressed"));
  for (const tab of document.querySelectorAll(".tabs button"))
    tab.onclick = () => {
      byId("sides").dataset.side = tab.dataset.side;
      for (const other of tab.parentNode.children) other.setAttribute("aria-pressed", other === tab);
    };
  byId("previous").onclick = () => move(-1);
  byId("next").onclick = () => move(1);
  byId("copy").onclick = async ({ currentTarget: button }) => {
    const done = await copied(whole(queries[selected]));
    button.focus();
    button.textContent = byId("status").textContent = done ? "Copied" : "The browser refused";
    setTimeout(() => (button.textContent = "Copy as JSON"), 2000);
  };
  document.onkeydown = (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const other = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.isComposing;
    // Within the texts the arrows scroll, as they do everywhere.
    if (!step || other || event.target.closest("#subject, #sides, #filter")) return;
    event.preventDefault();
    move(step);
  };
  onhashchange = follow;
  follow();
})();
