// What plain forms and links cannot do: drop, paste and preview a photo, and keys.
"use strict";

const KEPT = "crosstill.photo";
const form = document.getElementById("search");
const box = document.getElementById("q");
const photo = document.getElementById("photo");
const relevant = document.getElementById("relevant");
const sender = form.querySelector(".send");
const drop = document.getElementById("drop");
const said = document.getElementById("said");
const count = document.getElementById("count");

/* a region that is filled after the page has loaded is read out */
function say(text) {
  said.textContent = "";
  setTimeout(() => { said.textContent = text; }, 100);
}

/* sending */

form.addEventListener("submit", (event) => {
  const byPhoto = event.submitter === sender;
  if (!byPhoto && box.value.trim() === "") {
    event.preventDefault();
    box.focus();
    return;
  }
  // words left over from the search before are not meant for a photo dropped now
  box.disabled = byPhoto && box.value === box.defaultValue;
  photo.disabled = !byPhoto;
  document.body.classList.add("waiting");
  say("Searching");
});

/* also when the browser brings a left page back as it was */
window.addEventListener("pageshow", () => {
  box.disabled = photo.disabled = false;
  photo.value = "";
  document.body.classList.remove("waiting");
  say(count ? count.textContent : "");
});

if (relevant) {
  relevant.addEventListener("change", () => {
    if (box.value.trim() !== "") form.requestSubmit();
  });
}

/* a photo: chosen, dropped or pasted */

function choose(file) {
  if (!file) return;
  const limit = Number(form.dataset.limit);
  if (limit && file.size > limit) {
    refuse(`This photo is too large: at most ${Math.floor(limit / 1e6)} MB can be sent.`);
    return;
  }
  const held = new DataTransfer();
  held.items.add(file);
  photo.files = held.files;
  keep(file).then(() => form.requestSubmit(sender));
}

function refuse(text) {
  const line = document.getElementById("refusal");
  line.textContent = text;
  line.hidden = false;
  photo.value = "";
  say(text);
}

/* a small copy to show beside the answers: a page asked for by POST cannot name the photo */
async function keep(file) {
  try {
    sessionStorage.removeItem(KEPT);
    const whole = await createImageBitmap(file);
    const scale = Math.min(1, 240 / Math.min(whole.width, whole.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(whole.width * scale));
    canvas.height = Math.max(1, Math.round(whole.height * scale));
    canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
    sessionStorage.setItem(KEPT, canvas.toDataURL("image/jpeg", 0.85));
  } catch {
    // no preview of what this browser cannot draw: the server decides what it can read
  }
}

function preview(image) {
  if (!image) return;
  let kept = null;
  try {
    kept = sessionStorage.getItem(KEPT);
  } catch {
    // storage is switched off
  }
  if (!kept) return;
  const bytes = Uint8Array.from(atob(kept.split(",")[1]), (letter) => letter.charCodeAt(0));
  image.src = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  image.hidden = false;
}

preview(document.getElementById("preview"));

photo.addEventListener("change", () => choose(photo.files[0]));

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  choose(file);
});

/* results dragged about are not new photos */
let ours = false;
const brings = (event) => !ours && event.dataTransfer.types.includes("Files");

document.addEventListener("dragstart", () => { ours = true; });
document.addEventListener("dragend", () => { ours = false; });
document.addEventListener("dragover", (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  event.dataTransfer.dropEffect = "copy";
  drop.hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.hidden = true;
});
document.addEventListener("drop", (event) => {
  if (!brings(event)) return;
  event.preventDefault();
  drop.hidden = true;
  choose(event.dataTransfer.files[0]);
});

/* keys: / for the box, arrows from result to result */

const results = [...document.querySelectorAll(".results .photo")];

function below(at, way) {
  const here = results[at].getBoundingClientRect();
  const column = (i) => Math.abs(results[i].getBoundingClientRect().left - here.left) < 1;
  for (let i = at + way; i >= 0 && i < results.length; i += way) if (column(i)) return i;
  return at;
}

function next(key, at) {
  if (key === "ArrowRight") return at + 1;
  if (key === "ArrowLeft") return at - 1;
  if (key === "ArrowDown") return below(at, 1);
  if (key === "ArrowUp") return below(at, -1);
  if (key === "Home") return 0;
  if (key === "End") return results.length - 1;
  return at;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    box.focus();
    box.select();
    return;
  }
  const item = event.target.closest(".results li");
  if (!item && event.target !== box) return;
  const at = item ? results.indexOf(item.querySelector(".photo")) : -1;
  const to = item ? next(event.key, at) : event.key === "ArrowDown" ? 0 : at;
  if (to === at || !results[to]) return;
  event.preventDefault();
  results[to].focus();
});
