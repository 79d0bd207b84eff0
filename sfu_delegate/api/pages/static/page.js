// Brings the page up to date: asks for the same page again and puts what has changed into this one. Without it, the page works as well.
//
// What does not change stays what it is, so that focus, selection, scrolling and open details are kept, and nothing is read aloud for nothing.
"use strict";

(() => {
  const live = document.getElementById("live");
  const every = Number(live.dataset.refresh) * 1000;
  if (!every) return;

  const PATIENCE = 15000;
  const words = document.createElement("p");
  const announced = document.createElement("p");
  const pause = document.createElement("button");
  announced.setAttribute("role", "status");
  announced.className = "sr";
  pause.type = "button";
  pause.textContent = "Pause";
  live.append(words, announced, pause);

  let wait = every;
  let timer = 0;
  let asking = false;
  let asked = Date.now();
  let trouble = "";
  let paused = remembered() === "paused";

  function remembered(value) {
    try {
      if (value !== undefined) sessionStorage.setItem("refresh", value);
      return sessionStorage.getItem("refresh");
    } catch {
      return null; // storage may be off
    }
  }

  function tell() {
    const at = document.querySelector("#as-of time");
    const since = at ? at.textContent : "";
    pause.setAttribute("aria-pressed", String(paused));
    live.classList.toggle("stale", trouble !== "");
    document.documentElement.classList.toggle("stale-page", trouble !== "");
    words.textContent = trouble ? `${trouble} What is shown is of ${since}.` : paused ? `Paused: of ${since}.` : `As of ${since}, every ${Math.round(wait / 1000)} s.`;
    const say = trouble || (paused ? "Paused." : "");
    if (announced.textContent !== say) announced.textContent = say;
  }

  function plan(after) {
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(refresh, after);
  }

  async function refresh() {
    if (asking || paused || document.hidden) return;
    asking = true;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (answer.ok) {
        bring(fresh);
        trouble = "";
      } else {
        const said = fresh.querySelector("main p");
        trouble = `Answered with ${answer.status}: ${said ? said.textContent.trim() : "no reason was given."}`;
      }
    } catch {
      trouble = navigator.onLine === false ? "This device is offline." : "The daemon does not answer.";
    }
    asking = false;
    asked = Date.now();
    tell();
    plan(wait);
  }

  function bring(fresh) {
    const script = (page) => page.querySelector("script[src]").getAttribute("src");
    if (script(fresh) !== script(document)) {
      location.reload(); // another version runs now
      return;
    }
    const focused = document.activeElement;
    for (const id of ["main", "as-of"]) morph(document.getElementById(id), fresh.getElementById(id));
    document.title = fresh.title;
    wait = Number(fresh.getElementById("live").dataset.refresh) * 1000 || every;
    if (focused && focused !== document.body && focused !== document.activeElement) {
      const stays = focused.isConnected ? focused : document.getElementById("main");
      stays.focus({ preventScroll: true });
    }
  }

  const keyOf = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.dataset.key || node.id : "");

  // Makes `old` what `fresh` is, and leaves alone what is so already.
  function morph(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || keyOf(old) !== keyOf(fresh)) {
      old.replaceWith(document.importNode(fresh, true));
      return;
    }
    if (old.nodeType !== Node.ELEMENT_NODE) {
      old.nodeValue = fresh.nodeValue;
      return;
    }
    if ("keep" in old.dataset) return; // a form, which somebody may be filling in
    for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !isOpen(old, name)) old.removeAttribute(name);
    for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value && !isOpen(old, name)) old.setAttribute(name, value);
    children(old, fresh);
  }

  const isOpen = (node, name) => node.nodeName === "DETAILS" && name === "open";

  function children(old, fresh) {
    const wanted = new Set([...fresh.children].map(keyOf).filter(Boolean));
    const keyed = new Map([...old.children].filter(keyOf).map((node) => [keyOf(node), node]));
    let at = old.firstChild;
    const skipGone = () => {
      while (at && keyOf(at) && !wanted.has(keyOf(at))) {
        const gone = at;
        at = at.nextSibling;
        gone.remove();
      }
    };
    for (const node of [...fresh.childNodes]) {
      skipGone();
      const key = keyOf(node);
      const match = key ? keyed.get(key) : at && !keyOf(at) ? at : null;
      if (!match) {
        old.insertBefore(document.importNode(node, true), at);
      } else {
        if (match === at) at = at.nextSibling;
        else old.insertBefore(match, at);
        morph(match, node);
      }
    }
    while (at) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
  }

  pause.addEventListener("click", () => {
    paused = !paused;
    remembered(paused ? "paused" : "");
    tell();
    plan(0);
  });
  document.addEventListener("visibilitychange", () => plan(Math.max(0, asked + wait - Date.now())));
  addEventListener("online", () => plan(0));
  tell();
  plan(wait);
})();
