"""What runs in the browser beside gradio's own: scripts and colours."""

from __future__ import annotations

import json

import gradio as gr

from tapt.ui import render, results

# gradio's dropdown would open its list again when Tab leaves it, or lose the focus to a long one;
# its fields show an error and do not say so
KEYS = """() => {
  document.addEventListener("keydown", event => {
    if (event.key !== "Tab" || event.target.role !== "combobox") return;
    event.stopPropagation();
    document.querySelectorAll("[role=listbox]").forEach(list => list.tabIndex = -1);
  }, true);
  let marked = [];
  new MutationObserver(() => {
    const wrong = [...document.querySelectorAll("div.validation-error")]
      .map(error => error.closest(".block").querySelector("textarea, input")).filter(Boolean);
    marked.forEach(field => wrong.includes(field) || field.removeAttribute("aria-invalid"));
    wrong.forEach(field => field.setAttribute("aria-invalid", true));
    if (wrong.length && !wrong.some(field => marked.includes(field))) wrong[0].focus();
    marked = wrong;
  }).observe(document.body, {childList: true, subtree: true});
}"""
# gradio tells no handler which values a shown result belongs to
ASKED = "(...v) => { window.taptAsked = JSON.stringify(v) }"
RUNS = "() => { window.taptRan = window.taptAsked; return '' }"  # it was not refused
STALE = f"""(...v) => window.taptRan && window.taptRan !== JSON.stringify(v)
  ? {json.dumps(render.note(render.EARLIER, warn=True))} : ''"""
# after Stop or a fault, rows without an answer will not get one
ENDED = f"""(text, rows) => [text.replace(/Running…|So far/, '{results.STOPPED}'),
  rows.replaceAll('>{results.WAITING}<', '>{results.NOT_RUN}<')]"""
ATTACK_THIS = """element.addEventListener('click', event => {
  const button = event.target.closest('[data-attack]');
  if (button) trigger('click', {attacked: button.dataset.attack});
})"""
CHIPS = """const chips = () => [...element.querySelectorAll('button')];
const act = event => {
  const place = chips().indexOf(event.target.closest('button'));
  const key = event.key ?? event.type, step = {ArrowLeft: -1, ArrowRight: 1}[key];
  if (step) chips()[place + step]?.focus();
  if (place < 0 || !['click', 'Delete', 'Backspace'].includes(key)) return;
  new MutationObserver((_, observer) => {
    observer.disconnect();
    chips()[Math.min(place, chips().length - 1)]?.focus();
  }).observe(element, {childList: true, subtree: true});
  trigger('click', {name: chips()[place].dataset.name});
};
element.addEventListener('click', act);
element.addEventListener('keydown', act);"""
LINK = """const follow = () => { if (location.hash.startsWith('#x='))
  trigger('click', {link: location.hash.slice(3)}) };
window.addEventListener('hashchange', follow); setTimeout(follow, 500);"""
# gradio's own shades of these, light and dark, stay under the contrast that WCAG AA asks for
SHADES = {
    "body_text_color_subdued": ("neutral", 600, 400),
    "block_info_text_color": ("neutral", 600, 400),
    "block_label_text_color": ("neutral", 700, 200),
    "block_title_text_color": ("neutral", 700, 200),
    "checkbox_border_color": ("neutral", 500, 400),
    "input_placeholder_color": ("neutral", 500, 400),
    "button_primary_background_fill": ("primary", 600, 600),
    "button_primary_background_fill_hover": ("primary", 700, 700),
}
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    **{
        name + mode: f"*{hue}_{shade}"
        for name, (hue, *shades) in SHADES.items()
        for mode, shade in zip(("", "_dark"), shades, strict=True)
    }
)
