// Draws every figure in the colors of the page, and again when the person turns from light to dark.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colored = (value, style) => {
    if (typeof value === "string") {
      const named = /^var\((--[\w-]+)\)$/.exec(value);
      return named ? style.getPropertyValue(named[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => colored(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, colored(item, style)]));
  };
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    const settings = { displayModeBar: false, displaylogo: false, responsive: true };
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = colored(figure, style);
      layout.font.family = getComputedStyle(document.body).fontFamily;
      Plotly.react(document.getElementById(id), data, layout, settings);
    }
  };
  dark.addEventListener("change", draw);
  draw();
})();
