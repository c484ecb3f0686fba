"use strict";
// Draws every plot that the page's data names; window.plotsDrawn tells a test how many are there.
window.plotsDrawn = 0;
(function () {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const options = { responsive: true, displayModeBar: false };
  const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");
  const PRINTED_WIDTH = 680; // pixels, of an A4 page between its margins
  // figures.py has the colours of a light page.
  const DARK = { "#ffffff": "#161c25", "#1c2430": "#dbe3ee", "#e8edf2": "#2a3442", "#b9cdf3": "#41557d", "#2450a4": "#8fb4ff" };

  // The plot in the colours of the page as it is now.
  function coloured(plot) {
    const text = JSON.stringify(plot);
    if (!dark.matches) return JSON.parse(text);
    return JSON.parse(text.replace(/"(#[0-9a-f]{6})"/g, (all, colour) => `"${DARK[colour] || colour}"`));
  }

  function draw(change) {
    for (const [name, plot] of Object.entries(plots)) {
      const { data, layout } = coloured(plot);
      Plotly.react(document.getElementById(name), data, Object.assign(layout, change), options);
    }
  }

  for (const [name, plot] of Object.entries(plots)) {
    const element = document.getElementById(name);
    const { data, layout } = coloured(plot);
    Plotly.newPlot(element, data, layout, options).then(function () {
      element.addEventListener("keydown", onKey);
      window.plotsDrawn += 1;
      document.body.dataset.plotsDrawn = String(window.plotsDrawn);
    });
  }
  dark.addEventListener("change", () => draw({}));
  // A plot is as wide as it was on the screen, and paper would cut it.
  window.addEventListener("beforeprint", () => draw({ width: PRINTED_WIDTH, autosize: false }));
  window.addEventListener("afterprint", () => draw({ autosize: true }));

  // What the mouse does by dragging: + and - zoom along x, the arrows move, 0 shows everything.
  const moves = { "+": [0.25, -0.25], "=": [0.25, -0.25], "-": [-0.5, 0.5], ArrowLeft: [-0.2, -0.2], ArrowRight: [0.2, 0.2] };
  function onKey(event) {
    const plot = event.currentTarget;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "0") {
      Plotly.relayout(plot, { "xaxis.autorange": true, "yaxis.autorange": true });
    } else if (event.key in moves) {
      const [from, to] = plot.layout.xaxis.range;
      const [first, last] = moves[event.key].map((part) => part * (to - from));
      Plotly.relayout(plot, { "xaxis.range": [from + first, to + last] });
    } else {
      return;
    }
    event.preventDefault();
  }
})();
