// Plays the clips of one prompt in step: the first is the clock, the others are put right when they are half a frame off.
"use strict";
const player = document.querySelector(".player");
const fps = Number(player.dataset.fps);
const frames = Number(player.dataset.frames);
const [button, scrub, label] = ["#play", "#scrub", "#frame"].map((id) => document.querySelector(id));
const speed = document.querySelector("#speed");
const grids = [...document.querySelectorAll(".grid[data-prompt]")];
let playing = false;

const shown = () => [...grids.find((grid) => !grid.hidden).querySelectorAll("video")];

function mark(frame) {
  scrub.value = frame;
  label.textContent = `frame ${frame + 1} of ${frames}`;
}

function seek(frame) {
  const at = Math.min(Math.max(frame, 0), frames - 1);
  for (const video of shown()) video.currentTime = (at + 0.5) / fps;
  mark(at);
}

function play(on) {
  playing = on;
  button.textContent = on ? "Pause" : "Play";
  for (const video of shown()) {
    video.playbackRate = Number(speed.value);
    if (on) video.play().catch(() => play(false));
    else video.pause();
  }
  if (!on) seek(Number(scrub.value));
}

function again() {
  for (const video of shown()) {
    video.currentTime = 0;
    video.play().catch(() => play(false));
  }
}

function tick() {
  if (playing) {
    const [clock, ...others] = shown();
    if (clock.ended || clock.currentTime >= (frames - 0.1) / fps) again();
    else {
      for (const video of others) {
        if (Math.abs(video.currentTime - clock.currentTime) > 0.5 / fps) video.currentTime = clock.currentTime;
        if (video.paused && !video.ended) video.play().catch(() => {});
      }
      mark(Math.min(Math.floor(clock.currentTime * fps), frames - 1));
    }
  }
  requestAnimationFrame(tick);
}

button.addEventListener("click", () => play(!playing));
scrub.addEventListener("input", () => { play(false); seek(Number(scrub.value)); });
document.querySelector("#back").addEventListener("click", () => { play(false); seek(Number(scrub.value) - 1); });
document.querySelector("#next").addEventListener("click", () => { play(false); seek(Number(scrub.value) + 1); });
speed.addEventListener("change", () => play(playing));
document.querySelector("#errors").addEventListener("click", (event) => {
  const off = player.classList.toggle("no-errors");
  event.target.setAttribute("aria-pressed", String(!off));
});
document.querySelector("#prompt").addEventListener("change", (event) => {
  const on = playing;
  play(false);
  for (const grid of grids) grid.hidden = grid.dataset.prompt !== event.target.value;
  seek(0);
  play(on);
});
seek(0);
tick();
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play(true);
