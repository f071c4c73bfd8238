"use strict";
// What all pages share: data(name), what `{{ data(name, value) }}` put in; colour(name), one of base.css's as it is now;
// the button for light or dark. A "theme" event on the document tells that colours changed.

function data(name) {
  return JSON.parse(document.getElementById(name).textContent);
}

function colour(name) {
  const probe = document.body.appendChild(document.createElement("span"));
  probe.style.color = `var(--${name})`;
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

(() => {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const changed = () => document.dispatchEvent(new Event("theme"));
  const kept = (theme) => { // storage may be closed to files
    try { return theme ? localStorage.setItem("theme", theme) : localStorage.getItem("theme"); } catch { return null; }
  };
  const chosen = kept();
  if (chosen) root.dataset.theme = chosen;
  system.addEventListener("change", changed);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
      root.dataset.theme = dark ? "light" : "dark";
      kept(root.dataset.theme);
      changed();
    });
  });
})();
