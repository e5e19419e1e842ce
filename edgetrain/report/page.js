// Reading a chart with the pointer or the arrow keys: the line below it says what is there.
for (const chart of document.querySelectorAll("svg.chart")) {
  const line = chart.parentElement.querySelector("output");
  const parts = [...chart.querySelectorAll(".hit, .mark")];
  let at = -1;
  const show = (index) => {
    parts[at]?.classList.remove("on");
    at = Math.max(0, Math.min(parts.length - 1, index));
    parts[at].classList.add("on");
    line.textContent = parts[at].querySelector("title").textContent;
  };
  parts.forEach((part, index) => part.addEventListener("pointerenter", () => show(index)));
  chart.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: parts.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
  });
}
