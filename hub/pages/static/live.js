// Progress without a reload, and a prompt file read into its field. The pages work without this script.
"use strict";

const JOB_STATUS = 8; // the body's type, its first byte

function follow(place) {
  const states = place.dataset.states.split(" "); // each status the gateway can send, in its order: "running:3"
  const text = place.querySelector("[data-state]");
  const bar = place.querySelector("progress");
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
