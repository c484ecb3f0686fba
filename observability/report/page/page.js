"use strict";
// Draws every plot that the page's data names; window.plotsDrawn tells a test how many are there.
window.plotsDrawn = 0;
(function () {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const options = { responsive: true, displayModeBar: false };
  for (const [name, plot] of Object.entries(plots)) {
    const element = document.getElementById(name);
    Plotly.newPlot(element, plot.data, plot.layout, options).then(function () {
      element.addEventListener("keydown", onKey);
      window.plotsDrawn += 1;
      document.body.dataset.plotsDrawn = String(window.plotsDrawn);
    });
  }

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
