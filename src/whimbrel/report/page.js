// Shows the titles of marks at once and beside the pointer; without scripts the browser shows them itself.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  for (const title of document.querySelectorAll("svg title")) {
    title.parentElement.dataset.tip = title.textContent;
    title.remove();
  }
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointermove", (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (!mark) return hide();
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const room = document.documentElement.clientWidth;
    const left = Math.min(event.clientX + 14, room - tip.offsetWidth - 8);
    const above = event.clientY - tip.offsetHeight - 12;
    tip.style.transform = `translate(${Math.max(8, left)}px, ${above > 8 ? above : event.clientY + 20}px)`;
  });
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("pointerleave", hide);
})();
