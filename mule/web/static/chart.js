// Charts: plotly's own script from the installed package, in the colours of the page.

let loading;

function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = "/static/plotly.js";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject({ message: "plotly's script did not load", hint: "reload" });
    document.head.append(script);
  });
  return loading;
}

const CONFIG = { responsive: true, displaylogo: false, scrollZoom: false, modeBarButtonsToRemove: ["sendChartToCloud", "sendDataToCloud", "lasso2d", "select2d"] };

/** Draw or update: `traces` and `layout` as plotly's; SVG traces only (others need eval). */
export async function draw(element, traces, layout = {}) {
  const Plotly = await plotly();
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true };
  await Plotly.react(element, traces, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style.fontFamily, color: colour("--text"), size: 12 },
    colorway: COLOURS,
    margin: { l: 50, r: 10, t: 30, b: 40 },
    hovermode: "x unified",
    uirevision: "kept", // zoom survives new points
    ...layout,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  }, CONFIG);
}

/** Free what a chart holds. */
export async function discard(element) {
  if (loading) (await loading).purge(element);
}

export const COLOURS = ["#2f81c7", "#d1495b", "#2e9b62", "#9a6bc0", "#c77d0a", "#7a7a7a"];
