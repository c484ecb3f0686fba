"use strict";
// Draws every plot that the page's data names; window.plotsDrawn tells a test how many are there.
window.plotsDrawn = 0;
(function () {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const options = { responsive: true, displayModeBar: false };
  for (const [name, plot] of Object.entries(plots)) {
    Plotly.newPlot(document.getElementById(name), plot.data, plot.layout, options).then(function () {
      window.plotsDrawn += 1;
      document.body.dataset.plotsDrawn = String(window.plotsDrawn);
    });
  }
})();
