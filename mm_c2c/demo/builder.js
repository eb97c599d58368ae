// The canvas of the scene builder. Runs once, with Gradio's `element` and `props`.
// `props.value` always holds what lies where, as `builder.py` reads it.
const { stickers, backgrounds, limits } = props;
const canvas = element.querySelector(".canvas");
const status = element.querySelector(".status");
const scene = { background: 0, stickers: [] };
let chosen = null;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const place = (s) =>
  [["top", "middle", "bottom"][Math.min(Math.floor(3 * s.y), 2)],
   ["left", "center", "right"][Math.min(Math.floor(3 * s.x), 2)]].join(" ");

function publish() {
  props.value = JSON.stringify({
    background: scene.background,
    stickers: scene.stickers.map(({ name, x, y, size }) => ({ name, x, y, size })),
  });
}

function show(sticker) {
  const style = sticker.node.style;
  style.left = `${100 * sticker.x}%`;
  style.top = `${100 * sticker.y}%`;
  style.width = style.height = `${100 * sticker.size}%`;
  sticker.node.setAttribute("aria-label", `${sticker.name}, ${place(sticker)}`);
  publish();
}

function choose(sticker) {
  chosen = sticker;
  for (const s of scene.stickers) s.node.classList.toggle("chosen", s === sticker);
}

function add(name, x, y) {
  if (scene.stickers.length >= limits.count) {
    status.textContent = `There is room for ${limits.count} stickers: remove one first.`;
    return;
  }
  const node = document.createElement("button");
  node.type = "button";
  node.className = "sticker";
  const image = document.createElement("img");
  image.src = stickers[name];
  image.alt = "";
  node.append(image);
  const sticker = { name, x, y, size: 0.3, node };
  scene.stickers.push(sticker);
  canvas.append(node);
  node.addEventListener("pointerdown", (event) => drag(event, sticker));
  node.addEventListener("keydown", (event) => press(event, sticker));
  node.addEventListener("focus", () => choose(sticker));
  show(sticker);
  choose(sticker);
  status.textContent = `${name} added, ${place(sticker)}.`;
}

function remove(sticker) {
  if (!sticker) return;
  const index = scene.stickers.indexOf(sticker);
  scene.stickers.splice(index, 1);
  sticker.node.remove();
  const next = scene.stickers[Math.min(index, scene.stickers.length - 1)];
  choose(next || null);
  if (next) next.node.focus();
  publish();
  status.textContent = `${sticker.name} removed.`;
}

function scale(sticker, factor) {
  if (!sticker) return;
  sticker.size = clamp(sticker.size * factor, limits.min, limits.max);
  show(sticker);
}

function press(event, sticker) {
  const step = event.shiftKey ? 0.1 : 0.02;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const acts = {
    "+": () => scale(sticker, 1.1), "=": () => scale(sticker, 1.1), "-": () => scale(sticker, 1 / 1.1),
    Delete: () => remove(sticker), Backspace: () => remove(sticker),
  };
  if (moves[event.key]) {
    sticker.x = clamp(sticker.x + moves[event.key][0], 0, 1);
    sticker.y = clamp(sticker.y + moves[event.key][1], 0, 1);
    show(sticker);
    status.textContent = `${sticker.name}, ${place(sticker)}.`;
  } else if (acts[event.key]) acts[event.key]();
  else return;
  event.preventDefault();
}

// Where on the canvas a pointer is, as shares of its side; null beside it.
function spot(event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return x >= 0 && x <= 1 && y >= 0 && y <= 1 ? [x, y] : null;
}

function drag(event, sticker) {
  event.preventDefault();
  sticker.node.focus();
  sticker.node.setPointerCapture(event.pointerId);
  const move = (moved) => {
    const box = canvas.getBoundingClientRect();
    sticker.x = clamp((moved.clientX - box.left) / box.width, 0, 1);
    sticker.y = clamp((moved.clientY - box.top) / box.height, 0, 1);
    show(sticker);
  };
  const end = () => {
    sticker.node.removeEventListener("pointermove", move);
    status.textContent = `${sticker.name}, ${place(sticker)}.`;
  };
  sticker.node.addEventListener("pointermove", move);
  sticker.node.addEventListener("pointerup", end, { once: true });
  sticker.node.addEventListener("pointercancel", end, { once: true });
}

// From the palette: dragged, it lands where it is let go; pressed, in the first free place.
function take(event, name) {
  const from = [event.clientX, event.clientY];
  const ghost = document.createElement("img");
  ghost.className = "ghost";
  ghost.src = stickers[name];
  ghost.alt = "";
  const follow = (moved) => {
    if (!ghost.isConnected && Math.hypot(moved.clientX - from[0], moved.clientY - from[1]) > 8)
      element.append(ghost);
    ghost.style.left = `${moved.clientX}px`;
    ghost.style.top = `${moved.clientY}px`;
  };
  const end = (up) => {
    document.removeEventListener("pointermove", follow);
    document.removeEventListener("pointerup", end);
    document.removeEventListener("pointercancel", end);
    const dragged = ghost.isConnected;
    ghost.remove();
    const at = up.type === "pointerup" && dragged && spot(up);
    if (at) add(name, ...at);
  };
  document.addEventListener("pointermove", follow);
  document.addEventListener("pointerup", end);
  document.addEventListener("pointercancel", end);
}

function addToFreePlace(name) {
  const cells = [[1, 1], [0, 0], [2, 2], [0, 2], [2, 0], [1, 0], [1, 2], [0, 1], [2, 1]];
  const free = cells.map(([row, col]) => [0.2 + 0.3 * col, 0.2 + 0.3 * row]).find(([x, y]) =>
    scene.stickers.every((s) => Math.hypot(s.x - x, s.y - y) > 0.2));
  add(name, ...(free || [0.5, 0.5]));
}

const palette = element.querySelector(".palette");
for (const name of Object.keys(stickers)) {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", `Add ${name}`);
  button.title = name;
  const image = document.createElement("img");
  image.src = stickers[name];
  image.alt = "";
  button.append(image);
  button.addEventListener("pointerdown", (event) => take(event, name));
  let downAt = null;
  button.addEventListener("pointerdown", (event) => { downAt = [event.clientX, event.clientY]; });
  button.addEventListener("click", (event) => {
    // A drag that ends on its own button is a click too; a key has no place.
    const moved = event.detail && downAt && Math.hypot(event.clientX - downAt[0], event.clientY - downAt[1]);
    if (!moved || moved <= 8) addToFreePlace(name);
  });
  palette.append(button);
}

function backdrop(index) {
  scene.background = index % backgrounds.length;
  canvas.style.backgroundImage = `url(${backgrounds[scene.background]})`;
  publish();
}

const tools = {
  Smaller: () => scale(chosen, 1 / 1.1),
  Larger: () => scale(chosen, 1.1),
  Remove: () => remove(chosen),
  "Other background": () => backdrop(scene.background + 1),
};
for (const [label, act] of Object.entries(tools)) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = label;
  button.addEventListener("click", act);
  element.querySelector(".tools").append(button);
}
backdrop(0);
