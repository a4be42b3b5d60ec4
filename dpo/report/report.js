// Values under the pointer, the finger or the arrow keys. Where the points lie was computed when
// the charts were drawn; here the nearest one is found and shown. Text is only ever set as text.
"use strict";

const element = (tag, parent, className, text) => {
  const made = parent.appendChild(document.createElement(tag));
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

// How far each key moves among `count` places.
const KEYS = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10,
  Home: -Infinity, End: Infinity };
const moved = (event, at, count) =>
  event.key in KEYS ? Math.min(count - 1, Math.max(0, at + KEYS[event.key])) : undefined;

for (const plot of document.querySelectorAll("[data-chart]")) {
  const { pick, series, stops } = JSON.parse(document.getElementById(plot.dataset.chart).textContent);
  let at = stops.length - 1;
  let shown = [];

  const hide = () => { shown.forEach((part) => part.remove()); shown = []; };

  const show = (stop) => {
    hide();
    at = stop;
    const [naming, index, points] = stops[at];
    const left = series[naming].x[index];
    if (pick === "x") {
      const cross = element("div", plot, "cross");
      cross.style.left = `${left}%`;
      shown.push(cross);
    }
    const tip = element("div", plot, "tip");
    element("b", tip, "", series[naming].at[index]);
    const lines = points.map(([s, i]) => {
      const { name, colour, x, y, at: places, text } = series[s];
      const dot = element("div", plot, "dot");
      Object.assign(dot.style, { left: `${x[i]}%`, top: `${y[i]}%`, background: `var(--${colour})` });
      shown.push(dot);
      const line = element("span", tip);
      element("i", line).style.background = `var(--${colour})`;
      const elsewhere = x[i] === left ? "" : ` (${places[i]})`;
      return element("span", line, "", `${name}${elsewhere}: ${text[i]}`).textContent;
    });
    // Beside the place, on the side with more room, and never outside of the window.
    const box = plot.getBoundingClientRect(), px = left * box.width / 100;
    const beside = left > 50 ? px - tip.offsetWidth - 10 : px + 10;
    const last = document.documentElement.clientWidth - 4 - tip.offsetWidth - box.left;
    tip.style.left = `${Math.max(4 - box.left, Math.min(last, beside))}px`;
    shown.push(tip);
    plot.setAttribute("aria-valuenow", at + 1);
    plot.setAttribute("aria-valuetext", [series[naming].at[index], ...lines].join("; "));
  };

  const nearest = (event) => {
    const box = plot.getBoundingClientRect();
    const px = event.clientX - box.left, py = event.clientY - box.top;
    const distance = ([s, i]) => Math.hypot(
      series[s].x[i] * box.width / 100 - px,
      pick === "point" ? series[s].y[i] * box.height / 100 - py : 0);
    const distances = stops.map(distance);
    return distances.indexOf(Math.min(...distances));
  };

  plot.addEventListener("pointermove", (event) => show(nearest(event)));
  plot.addEventListener("pointerdown", (event) => show(nearest(event)));
  plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) show(at); });
  plot.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const next = moved(event, at, stops.length);
    if (next === undefined) return;
    event.preventDefault();
    show(next);
  });
}

for (const answer of document.querySelectorAll(".tokens")) {
  const tokens = [...answer.children];
  const readout = answer.parentElement.querySelector(".readout");
  let at = -1;

  const show = (token) => {
    tokens[at]?.classList.remove("on");
    at = tokens.indexOf(token);
    token.classList.add("on");
    readout.textContent = `${JSON.stringify(token.textContent)}: ${token.dataset.reward}`;
  };

  for (const kind of ["pointerover", "pointerdown"]) {
    answer.addEventListener(kind, (event) => {
      if (tokens.includes(event.target)) show(event.target);
    });
  }
  answer.addEventListener("keydown", (event) => {
    const next = moved(event, at, tokens.length);
    if (next === undefined) return;
    event.preventDefault();
    show(tokens[next]);
  });
}
