// The leaderboard reloads itself every few seconds, and says when the server is out of reach.
"use strict";
const SECONDS = 3;

async function update() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("/", { cache: "no-cache" });
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of ["header", "main"]) {
      const [now, next] = [document, page].map((at) => at.querySelector(part));
      if (now.innerHTML !== next.innerHTML) now.replaceWith(next);
    }
    state.textContent = `as of ${new Date().toLocaleTimeString("en-GB")}`;
  } catch {
    state.textContent = "the server does not answer: these may be old";
  }
}
setInterval(() => document.hidden || update(), 1000 * SECONDS);
document.addEventListener("visibilitychange", () => document.hidden || update());
