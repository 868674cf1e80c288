const dark = matchMedia('(prefers-color-scheme: dark)');
const theme = () => {
  const style = getComputedStyle(document.documentElement);
  const [ink, rule, paper] = ['--muted', '--rule', '--paper'].map(
    name => style.getPropertyValue(name).trim());
  const colours = {'font.color': ink, 'hoverlabel.bgcolor': paper, 'hoverlabel.bordercolor': rule};
  for (const axis of ['xaxis', 'yaxis'])
    Object.assign(colours, {[axis + '.gridcolor']: rule, [axis + '.linecolor']: rule});
  return colours;
};
const drawn = Promise.all(Object.entries(charts).map(([id, figure]) => Plotly.newPlot(id,
  structuredClone(figure.data),
  // A finger scrolls the page; a mouse zooms the chart.
  {...figure.layout, dragmode: matchMedia('(pointer: coarse)').matches ? false : 'zoom'},
  {displayModeBar: false, responsive: true})));
const recolour = () => Object.keys(charts).forEach(id => Plotly.relayout(id, theme()));
drawn.then(recolour);
dark.addEventListener('change', recolour);
for (const button of document.querySelectorAll('.views button'))
  button.addEventListener('click', () => {
    for (const other of button.parentElement.children)
      other.setAttribute('aria-pressed', other === button);
    const {chart, view} = button.dataset;
    Plotly.update(chart, ...structuredClone(charts[chart].views[view]));
  });
