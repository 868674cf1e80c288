// Charts are drawn without this script. It tells of the mark nearest to the pointer or finger, and
// switches between the views of a chart.
const reach = 24;
const tip = document.body.appendChild(document.createElement('div'));
tip.className = 'tip';
tip.hidden = true;
let lit;
const light = mark => {
  lit?.classList.remove('lit');
  lit = mark;
  lit?.classList.add('lit');
  tip.hidden = !mark;
};
const follow = event => {
  const box = event.currentTarget.getBoundingClientRect();
  let nearest, least = reach;
  for (const mark of event.currentTarget.querySelectorAll('[data-tip]')) {
    const [x, y] = ['x', 'y'].map(
      name => parseFloat(mark.getAttribute('c' + name) ?? mark.getAttribute(name)) / 100);
    const distance = Math.hypot(
      box.left + x * box.width - event.clientX, box.top + y * box.height - event.clientY);
    if (distance < least) [nearest, least] = [mark, distance];
  }
  light(nearest);
  if (!nearest) return;
  tip.textContent = tips[nearest.dataset.tip];
  const room = [innerWidth - tip.offsetWidth - 8, innerHeight - tip.offsetHeight - 8];
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, room[0]))}px`;
  tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, room[1]))}px`;
};
for (const plot of document.querySelectorAll('.plot')) {
  plot.addEventListener('pointermove', follow);
  plot.addEventListener('pointerdown', follow);
  plot.addEventListener('pointerleave', () => light());
}
addEventListener('scroll', () => light());
for (const button of document.querySelectorAll('.views button'))
  button.addEventListener('click', () => {
    for (const other of button.parentElement.children)
      other.setAttribute('aria-pressed', other === button);
    for (const chart of button.closest('figure').querySelectorAll('.chart'))
      chart.hidden = chart.dataset.view !== button.dataset.view;
  });
