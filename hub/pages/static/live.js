// Progress without a reload, and a prompt file read into its field. The pages work without this script.
"use strict";

const JOB_STATUS = 8; // the body's type, its first byte
const TRAINING_CURVE = 13;

async function drawCurve(figure) {
  const answer = await fetch(figure.dataset.curve, { credentials: "same-origin" });
  const bytes = new Uint8Array(await answer.arrayBuffer());
  if (!answer.ok || bytes[0] !== TRAINING_CURVE) return;
  const codes = [...bytes.slice(1)].filter((code) => code !== 255); // 200ths; 255 is a sixteenth that has not begun
  figure.querySelector("polyline").setAttribute("points", codes.map((code, place) => `${20 * place + 10},${254 - code}`).join(" "));
  if (codes.length) figure.querySelector("[data-reached]").textContent = codes.map((code) => code / 200).join(", ");
}

function follow(place) {
  const states = place.dataset.states.split(" "); // each status the gateway can send, in its order: "running:3"
  const text = place.querySelector("[data-state]");
  const bar = place.querySelector("progress");
  const figure = document.querySelector("[data-curve]");
  let last = "";
  let pause = 400;
  async function look() {
    let status = null;
    try {
      const answer = await fetch(place.dataset.follow, { credentials: "same-origin" });
      const bytes = new Uint8Array(await answer.arrayBuffer());
      if (answer.ok && bytes.length === 2 && bytes[0] === JOB_STATUS) status = states[bytes[1]];
    } catch {
      // the gateway restarts: look again
    }
    if (status) {
      const [state, step] = status.split(":");
      if (text.textContent !== state) text.textContent = state;
      if (step && bar) bar.value = Number(step);
      if (figure && step !== undefined && status !== last) {
        last = status;
        await drawCurve(figure).catch(() => {}); // looked at once a step, not once a slot: each look is charged
      }
      if (!["queued", "running"].includes(state)) {
        location.reload();
        return;
      }
    }
    pause = Math.min(pause * 1.1, 5000);
    setTimeout(look, pause);
  }
  setTimeout(look, pause);
}

function readInto(input) {
  const field = document.getElementById(input.dataset.into);
  input.closest("p").hidden = false;
  input.addEventListener("change", async () => {
    if (input.files.length) field.value = await input.files[0].text();
  });
}

document.querySelectorAll("[data-follow]").forEach(follow);
document.querySelectorAll("input[type=file][data-into]").forEach(readInto);
