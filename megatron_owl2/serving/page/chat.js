// The page of a server: a conversation with images, streamed. All text is set by textContent.
"use strict";

const LARGE_FILE = 1 << 20; // bytes; larger images are redrawn, upright and smaller, before sending
const LARGEST_SIDE = 1600; // pixels, several times what the model looks at

const byId = (id) => document.getElementById(id);
const [log, form, text, errorLine, pendingList] = ["log", "composer", "text", "error", "pending"].map(byId);

let messages = []; // the conversation in the form of the API
let pending = []; // data URLs of images that the next message shows
let running = null; // AbortController of the answer under way
let limits = { max_images: 8, max_image_bytes: 16 << 20, max_tokens: 1024 };

async function connect() {
  try {
    const response = await fetch("limits");
    limits = await response.json();
    byId("model").textContent = limits.model;
    byId("max-tokens").max = limits.max_tokens;
  } catch {
    byId("model").textContent = "not connected";
  }
}

function element(tag, className, content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}

function showError(message) {
  errorLine.textContent = message;
  errorLine.hidden = !message;
}

function addTurn(role, content) {
  byId("welcome").hidden = true;
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const bubble = element("p", "bubble", content);
  turn.append(bubble);
  log.append(turn);
  return { turn, bubble };
}

function followEnd(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// Images.

function readAsDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function redrawn(file) {
  const image = await createImageBitmap(file);
  const scale = Math.min(1, LARGEST_SIDE / Math.max(image.width, image.height));
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // below transparency, as the model sees it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function shownImages() {
  const parts = messages.flatMap((message) => (Array.isArray(message.content) ? message.content : []));
  return parts.filter((part) => part.type === "image_url").length;
}

async function addFiles(files) {
  showError("");
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      showError(`${file.name} is not an image`);
      continue;
    }
    try {
      const small = file.size > LARGE_FILE ? await redrawn(file) : file;
      const url = await readAsDataUrl(small);
      if (shownImages() + pending.length >= limits.max_images) {
        showError(`A conversation shows at most ${limits.max_images} images; clear it to show others`);
        break;
      }
      pending.push(url);
    } catch {
      showError(`${file.name} cannot be read as an image`);
    }
  }
  showPending();
}

function showPending() {
  pendingList.replaceChildren(
    ...pending.map((url, index) => {
      const item = element("li");
      const image = element("img");
      image.src = url;
      image.alt = `Image ${index + 1} to send`;
      const remove = element("button", "", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove image ${index + 1}`);
      remove.onclick = () => {
        pending.splice(index, 1);
        showPending();
        text.focus();
      };
      item.append(image, remove);
      return item;
    }),
  );
}

// The conversation.

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}`;
  }
}

async function* answer(signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    signal,
    body: JSON.stringify({
      messages,
      stream: true,
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("max-tokens").value) || null,
    }),
  });
  if (!response.ok) throw new Error(await reasonOf(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice) yield choice;
  }
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  log.setAttribute("aria-busy", String(controller !== null));
}

function userMessage(question, images) {
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: parts.length ? [...parts, { type: "text", text: question }] : question };
}

function showQuestion(question, images) {
  const shown = addTurn("user", question);
  shown.bubble.hidden = !question;
  if (images.length) {
    const row = element("div", "images");
    images.forEach((url, index) => {
      const image = element("img");
      image.src = url;
      image.alt = `Image ${index + 1} of this message`;
      row.append(image);
    });
    shown.turn.prepend(row);
  }
  log.scrollTop = log.scrollHeight;
  return shown;
}

async function ask(question, images) {
  const asked = showQuestion(question, images);
  const shown = addTurn("assistant", "");
  shown.turn.classList.add("waiting");
  log.scrollTop = log.scrollHeight;
  messages.push(userMessage(question, images));
  const controller = new AbortController();
  setRunning(controller);
  let said = "";
  let note = "";
  let failed = "";
  try {
    for await (const choice of answer(controller.signal)) {
      said += choice.delta.content ?? "";
      if (choice.finish_reason === "length") note = "cut at the longest answer";
      followEnd(() => { shown.bubble.textContent = said; });
    }
  } catch (error) {
    if (controller.signal.aborted) note = "stopped";
    else failed = error instanceof TypeError ? "The server cannot be reached" : error.message;
  }
  if (running !== controller) return; // cleared meanwhile
  setRunning(null);
  shown.turn.classList.remove("waiting");
  settle(question, images, said, failed, asked, shown);
  if (note) followEnd(() => shown.turn.append(element("p", "note", note)));
}

// What becomes of a turn: an answer without text cannot be continued, so both leave the conversation.
function settle(question, images, said, failed, asked, shown) {
  if (said.trim()) {
    messages.push({ role: "assistant", content: said });
  } else {
    messages.pop();
    asked.turn.classList.add("failed");
    shown.bubble.textContent = failed ? "no answer" : "(an empty answer)";
    shown.turn.classList.add("failed");
  }
  if (!failed) return;
  showError(failed);
  if (!said.trim() && !text.value && !pending.length) {
    text.value = question;
    pending = images;
    showPending();
    fitText();
  }
}

function clearAll() {
  const controller = running;
  setRunning(null);
  controller?.abort();
  messages = [];
  pending = [];
  showPending();
  showError("");
  log.querySelectorAll(".turn").forEach((turn) => turn.remove());
  byId("welcome").hidden = false;
  text.focus();
}

function fitText() {
  text.style.height = "auto";
  text.style.height = `${Math.min(text.scrollHeight + 2, 160)}px`;
}

// Controls.

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (running || (!question && !pending.length)) return;
  const images = pending;
  pending = [];
  text.value = "";
  showPending();
  showError("");
  fitText();
  ask(question, images);
});

text.addEventListener("input", fitText);
text.addEventListener("keydown", (event) => {
  const typing = event.isComposing || event.shiftKey || matchMedia("(pointer: coarse)").matches;
  if (event.key === "Enter" && !typing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", clearAll);
byId("files").addEventListener("change", async (event) => {
  await addFiles([...event.target.files]);
  event.target.value = "";
  text.focus();
});

byId("settings-button").addEventListener("click", (event) => {
  const settings = byId("settings");
  settings.hidden = !settings.hidden;
  event.currentTarget.setAttribute("aria-expanded", String(!settings.hidden));
});
byId("temperature").addEventListener("input", (event) => {
  byId("temperature-value").textContent = event.target.value;
});

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    addFiles(files);
  }
});

let dragDepth = 0; // enter and leave come for every element below the pointer
const isFiles = (event) => event.dataTransfer?.types.includes("Files");
const setDragging = (depth) => {
  dragDepth = depth;
  document.body.classList.toggle("dragging", depth > 0);
};
document.addEventListener("dragenter", (event) => isFiles(event) && setDragging(dragDepth + 1));
document.addEventListener("dragleave", (event) => isFiles(event) && setDragging(Math.max(0, dragDepth - 1)));
document.addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!isFiles(event)) return;
  event.preventDefault();
  setDragging(0);
  addFiles([...event.dataTransfer.files]);
});

connect();
