"use strict";

const el = (id) => document.getElementById(id);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });

let about = { methods: [], models: [], samples: [], most_bytes: 0 };
let body = null; // the image, as it will be sent
let shown = null; // what the server answered last, and the pixels that the model saw

function say(message, wrong = false) {
  el("error").hidden = !wrong;
  el(wrong ? "error" : "status").textContent = message;
  if (wrong) el("status").textContent = "";
}

async function start() {
  about = await (await fetch("api/about")).json();
  for (const name of about.models) el("models").append(new Option(name));
  el("model").value = about.models[0] ?? "";
  for (const slot of [0, 1]) {
    for (const { name, kind } of about.methods) el(`method-${slot}`).append(new Option(`${name} (${kind})`, name));
    el(`method-${slot}`).addEventListener("change", () => describe(slot));
    el(`share-${slot}`).addEventListener("input", () => describe(slot));
  }
  el("method-0").value = "tome";
  [0, 1].forEach(describe);
  for (const name of about.samples) {
    const button = Object.assign(document.createElement("button"), { type: "button", title: name });
    button.append(Object.assign(new Image(), { src: `api/sample/${encodeURIComponent(name)}`, alt: `Sample: ${name}` }));
    button.addEventListener("click", async () => {
      choose(await (await fetch(`api/sample/${encodeURIComponent(name)}`)).blob(), name);
      run();
    });
    el("samples").append(button);
  }
}

function describe(slot) {
  const method = about.methods.find(({ name }) => name === el(`method-${slot}`).value);
  el(`summary-${slot}`).textContent = method ? `${method.summary} ${method.source}.` : "";
  el(`share-text-${slot}`).textContent = `${el(`share-${slot}`).value} %`;
  el(`share-${slot}`).disabled = !method;
}

function choose(blob, name) {
  body = blob;
  el("chosen").textContent = name;
}

async function run() {
  if (!body) return say("Choose an image first.", true);
  if (body.size > about.most_bytes) {
    return say(`The image is too large: at most ${about.most_bytes / 2 ** 20} MiB are read.`, true);
  }
  const query = new URLSearchParams({ model: el("model").value.trim() });
  for (const slot of [0, 1]) {
    const name = el(`method-${slot}`).value;
    if (!name) continue;
    query.append("method", name);
    query.append("share", el(`share-${slot}`).value / 100);
  }
  el("run").disabled = true;
  say("Running, without and with reduction ...");
  try {
    const response = await fetch(`api/run?${query}`, { method: "POST", body });
    const answer = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
    if (!response.ok) return say(answer.error ?? `The server answered ${response.status}.`, true);
    await present(answer);
    say("Done.");
  } catch (error) {
    say(`The server cannot be reached (${error.message}).`, true);
  } finally {
    el("run").disabled = false;
  }
}

async function present(answer) {
  const image = Object.assign(new Image(), { src: answer.image });
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  shown = { answer, pixels, last: Math.max(0, ...answer.after.flatMap(({ blocks }) => blocks.map(({ block }) => block + 1))) };
  el("panels").replaceChildren(panel("Unpatched", answer.before, answer.before), ...answer.after.map((one) => panel(one.method, one, answer.before)));
  el("step").max = shown.last;
  el("step").value = shown.last;
  el("about").textContent = answer.about;
  el("result").hidden = false;
  draw();
}

function panel(title, one, before) {
  const made = el("panel").content.cloneNode(true);
  made.querySelector("h2").textContent = title;
  for (const { label, share } of one.top) {
    const row = document.createElement("tr");
    row.append(make("td", label), make("td", percent(share, 1)));
    row.style.background = `linear-gradient(90deg, var(--bar) ${100 * share}%, transparent ${100 * share}%)`;
    made.querySelector("tbody").append(row);
  }
  made.querySelector("table").hidden = !one.top.length;
  const costs = one === before ? "" : ` (${percent(one.ratio)})`;
  const time = one === before ? "" : ` (${percent(one.ms / before.ms)})`;
  made.querySelector("dl").append(
    make("dt", "Multiply-adds"), make("dd", `${one.gmacs.toFixed(3)} G${costs}`),
    make("dt", "Time, best of 5"), make("dd", `${one.ms.toFixed(1)} ms${time}`),
  );
  const recipe = made.querySelector(".recipe");
  recipe.hidden = !one.recipe;
  recipe.querySelector("pre").textContent = one.recipe ?? "";
  recipe.querySelector("pre").setAttribute("aria-label", `Recipe of ${title} as YAML`);
  recipe.querySelector("button").addEventListener("click", async ({ target }) => {
    await navigator.clipboard.writeText(one.recipe);
    target.textContent = "Copied";
    setTimeout(() => (target.textContent = "Copy"), 1500);
  });
  return made;
}

function draw() {
  const step = Number(el("step").value);
  el("step-text").textContent = step ? `block ${step - 1}` : "the patches";
  const articles = el("panels").querySelectorAll("article");
  paint(articles[0], null, "Unpatched", step);
  shown.answer.after.forEach((one, i) => {
    const past = one.blocks.filter(({ block, inside }) => block < step && !inside);
    const here = one.blocks.filter(({ block, inside }) => block === step - 1 && inside);
    paint(articles[i + 1], { grid: one.grid, ...(here.at(-1) ?? past.at(-1) ?? {}) }, one.method, step);
  });
}

function paint(article, entry, title, step) {
  const { pixels } = shown;
  const canvas = article.querySelector("canvas");
  const zoom = Math.max(1, Math.floor(448 / pixels.width));
  canvas.width = pixels.width * zoom;
  canvas.height = pixels.height * zoom;
  const out = new ImageData(new Uint8ClampedArray(pixels.data), pixels.width, pixels.height);
  const [high, wide] = entry?.grid ?? [0, 0];
  const token = entry?.assign;
  const patch = (x, y) => Math.floor((y * high) / pixels.height) * wide + Math.floor((x * wide) / pixels.width);
  if (token) {
    const sums = new Map();
    for (let y = 0, i = 0; y < pixels.height; y++) for (let x = 0; x < pixels.width; x++, i += 4) {
      const key = token[patch(x, y)];
      const sum = sums.get(key) ?? sums.set(key, [0, 0, 0, 0]).get(key);
      for (let c = 0; c < 3; c++) sum[c] += pixels.data[i + c];
      sum[3] += 1;
    }
    const sizes = new Map();
    for (const key of token) sizes.set(key, (sizes.get(key) ?? 0) + 1);
    for (let y = 0, i = 0; y < pixels.height; y++) for (let x = 0; x < pixels.width; x++, i += 4) {
      const key = token[patch(x, y)];
      if (key < 0) for (let c = 0; c < 3; c++) out.data[i + c] = 0.22 * pixels.data[i + c];
      else if (sizes.get(key) > 1) {
        const sum = sums.get(key);
        for (let c = 0; c < 3; c++) out.data[i + c] = sum[c] / sum[3];
      }
    }
  }
  const small = Object.assign(document.createElement("canvas"), { width: pixels.width, height: pixels.height });
  small.getContext("2d").putImageData(out, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (token) outline(context, canvas, token, high, wide);
  const count = token ? `${entry.tokens_out} tokens` : "all tokens";
  article.querySelector(".tokens").textContent = count;
  canvas.setAttribute("aria-label", `${title} after ${step ? `block ${step - 1}` : "the patches"}: ${count}`);
}

function outline(context, canvas, token, high, wide) {
  const [tall, broad] = [canvas.height / high, canvas.width / wide];
  context.strokeStyle = "rgba(255, 255, 255, 0.85)";
  context.lineWidth = 1.5;
  context.beginPath();
  for (let row = 0; row < high; row++) for (let column = 0; column < wide; column++) {
    const key = token[row * wide + column];
    if (column + 1 < wide && token[row * wide + column + 1] !== key) {
      context.moveTo((column + 1) * broad, row * tall);
      context.lineTo((column + 1) * broad, (row + 1) * tall);
    }
    if (row + 1 < high && token[(row + 1) * wide + column] !== key) {
      context.moveTo(column * broad, (row + 1) * tall);
      context.lineTo((column + 1) * broad, (row + 1) * tall);
    }
  }
  context.stroke();
}

el("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
el("step").addEventListener("input", draw);
el("file").addEventListener("change", ({ target }) => { if (target.files[0]) { choose(target.files[0], target.files[0].name); run(); } });
const drop = el("drop");
for (const kind of ["dragover", "dragenter"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) { choose(file, file.name); run(); }
});
start().catch((error) => say(`The server cannot be reached (${error.message}).`, true));
