"use strict";
// films: what was recorded, a parent before its fork. moments: for each position of the slider, which frame every film
// shows, as [film, scene, frame]; and whether they are the same bits.
const {films, moments} = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const names = films.length === 1 ? ["run"] : moments.some(({shared}) => shared) ? ["parent", "fork"] : ["one run", "another"];
const words = [...new Set(films.flatMap((film) => film.scenes.flatMap((scene) => scene.frames.flatMap(
  (frame) => Object.keys(frame.heat)))))];
const hidden = new Set();  // words whose maps are off

// --- what is shown, in words

/** What a film shows at a moment: {film, scene, frame, borrowed}, or null. */
function at(moment, column) {
  const place = moments[moment].shown[column];
  if (!place) return null;
  const [film, scene, frame] = place;
  return {film: films[film], scene: films[film].scenes[scene], frame: films[film].scenes[scene].frames[frame],
    borrowed: film !== column};
}
const first = (moment) => films.map((_, column) => at(moment, column)).find((one) => one);
const called = (scene) => scene.repetition ? `${scene.stage}, again (${scene.repetition + 1})` : scene.stage;
const stepOf = ({scene, frame}) => `${called(scene)}, step ${frame.index + 1} of ${frame.total}`;
const number = (value) => value == null ? "–" : value === 0 ? "0" : String(Number(value.toPrecision(4)));
const time = (seconds) => seconds < 1 ? `${number(1000 * seconds)} ms` : `${number(seconds)} s`;
const mebibytes = (bytes) => bytes == null ? "–" : `${Math.round(bytes / 2 ** 20)} MiB`;
const source = (file) => `data:image/webp;base64,${file}`;

/** An element; children that are strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "polyline", "rect", "text", "circle"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// --- pictures and numbers of one film

const measures = {
  "sigma": ({frame}) => `${number(frame.sigma)} → ${number(frame.sigma_next)}`,
  "timestep": ({frame}) => number(frame.timestep),
  "evaluations": ({frame}) => String(frame.evaluations),
  "time": ({frame}) => time(frame.seconds),
  "memory": ({frame}) => mebibytes(frame.memory),
  "size of x": ({frame}) => number(frame.norms.x),
  "size of x0": ({frame}) => number(frame.norms.x0),
  "size of eps": ({frame}) => number(frame.norms.eps),
  "size of the output": ({frame}) => number(frame.norms.out),
  "guidance scale": ({frame}) => frame.guided ? number(frame.guided.scale) : "off",
  "size of cond": ({frame}) => number(frame.guided?.cond),
  "size of uncond": ({frame}) => number(frame.guided?.uncond),
  "scale · (cond − uncond)": ({frame}) => number(frame.guided?.added),
  "guided − cond": ({frame}) => number(frame.guided?.moved),
};
const settings = {
  "prompt": ({scene}) => scene.prompt || "–",
  "negative prompt": ({scene}) => scene.negative_prompt || "–",
  "model": ({scene}) => scene.model,
  "solver": ({scene}) => scene.solver,
  "seed": ({film}) => String(film.seed),
  "device": ({film}) => film.device,
  "versions": ({film}) => Object.entries(film.versions).map((pair) => pair.join(" ")).join(", "),
};
const facts = {...measures, ...settings};

/** A picture with a caption, and a second one over it if there is heat. */
function figure(over) {
  const image = make("img"), heat = make("img", {alt: "", class: "over"}), caption = make("figcaption");
  return {root: make("figure", {}, make("div", {class: "frame"}, image, ...over ? [heat] : []), caption),
    show(file, cells, alt, text, hot) {
      image.src = source(file);
      image.className = cells ? "cells" : "";
      image.alt = alt;
      caption.textContent = text;
      if (hot) heat.src = source(hot);
    }};
}

function column(film, index) {
  const x = figure(), x0 = figure(), maps = new Map(words.map((word) => [word, figure(true)]));
  const badge = make("p", {class: "badge"}), values = new Map(Object.keys(facts).map((name) => [name, make("dd")]));
  const pictures = make("div", {class: "pictures"}, x.root, x0.root, ...[...maps.values()].map((map) => map.root));
  const list = make("dl", {class: "facts"}, ...[...values].flatMap(([name, value]) => [make("dt", {}, name), value]));
  const root = make("article", {"aria-label": `${names[index]}: ${film.title}`, class: films.length === 1 ? "alone" : ""},
    ...films.length > 1 ? [make("h2", {}, `${names[index]}: ${film.title}`), badge] : [], pictures, list);

  function show(moment) {
    const here = at(moment, index), beside = films.length > 1 ? at(moment, 1 - index) : null;
    pictures.hidden = list.hidden = !here;
    badge.textContent = !here ? "This run has no such step." : !moments[moment].shared ? "Not the same latents."
      : here.borrowed ? "Shared: computed once, by the parent." : "Shared: the same latents, bit for bit.";
    if (!here) return;
    const {frame} = here, where = stepOf(here);
    x.show(frame.x, !frame.finished, `x after ${where}, at sigma ${number(frame.sigma_next)}`,
      `x, at sigma ${number(frame.sigma_next)}`);
    x0.show(frame.x0, !frame.decoded, `x0 estimated in ${where}`, frame.decoded ? "x0, decoded" : "x0, in the latents' colours");
    for (const [word, map] of maps) {
      const heat = frame.heat[word];
      map.root.hidden = hidden.has(word) || !heat;
      if (heat) map.show(frame.x0, !frame.decoded, `Where “${word}” is attended to in ${where}`, `“${word}”`, heat);
    }
    for (const [name, value] of values) {
      value.textContent = facts[name](here);
      value.className = beside && !["time", "memory"].includes(name) && facts[name](here) !== facts[name](beside) ? "differs" : "";
    }
  }
  return {root, show};
}

// --- curves over all moments

const WIDE = 600, HIGH = 170, LEFT = 64, TOP = 10, BOTTOM = 18;
const across = (moment) => LEFT + (WIDE - LEFT - 8) * (moments.length < 2 ? 0.5 : moment / (moments.length - 1));

/** One set of axes; series are {name, of: frame => value}. Logarithmic axes leave out what is not above 0. */
function curve(title, series, logarithmic, show = number) {
  const scale = logarithmic ? Math.log10 : (value) => value;
  const good = (value) => value != null && (!logarithmic || value > 0);
  const values = moments.flatMap((_, moment) => films.flatMap((_, index) => {
    const here = at(moment, index);
    return here ? series.map(({of}) => of(here.frame)).filter(good).map(scale) : [];
  }));
  if (!values.length) return null;
  let low = logarithmic ? Math.min(...values) : Math.min(0, ...values), high = Math.max(...values);
  if (high - low < 1e-9) high = low + 1;
  const up = (value) => HIGH - BOTTOM - (HIGH - TOP - BOTTOM) * (scale(value) - low) / (high - low);
  const back = (value) => logarithmic ? 10 ** value : value;
  const text = (x, y, words, anchor = "end") => make("text", {x, y, "text-anchor": anchor}, words);
  const svg = make("svg", {viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img"});
  const shared = moments.flatMap((moment, index) => moment.shared ? [index] : []);
  for (const moment of shared) {
    const half = (across(1) - across(0)) / 2, x = Math.max(LEFT, across(moment) - half);
    svg.append(make("rect", {class: "shared", x, y: TOP, width: across(moment) + half - x, height: HIGH - TOP - BOTTOM}));
  }
  for (const value of [low, (low + high) / 2, high]) {
    const y = up(back(value));
    svg.append(make("line", {class: "axis", x1: LEFT, x2: WIDE, y1: y, y2: y}), text(LEFT - 5, y + 4, show(back(value))));
  }
  for (const [start, scene] of starts) {
    svg.append(make("line", {class: "axis", x1: across(start), x2: across(start), y1: TOP, y2: HIGH - BOTTOM}),
      text(across(start), HIGH - 4, called(scene), "start"));
  }
  films.forEach((_, index) => series.forEach(({of}, colour) => {
    const look = `c${colour}${films.length > 1 && !index ? " parent" : ""}`;
    starts.forEach(([start], number) => {
      const points = [];
      for (let moment = start; moment < (starts[number + 1]?.[0] ?? moments.length); moment++) {
        const here = at(moment, index), value = here && of(here.frame);
        if (here && good(value)) points.push([across(moment), up(value)]);
      }
      svg.append(points.length === 1 ? make("circle", {class: look, cx: points[0][0], cy: points[0][1], r: 2})
        : make("polyline", {class: look, points: points.map((point) => point.join()).join(" ")}));
    });
  }));
  const cursor = make("line", {class: "cursor", y1: TOP, y2: HIGH - BOTTOM});
  svg.append(cursor);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * WIDE / box.width;
    go(Math.round((x - LEFT) / (WIDE - LEFT - 8) * (moments.length - 1)));
  });
  const now = series.map(() => make("span")), keys = series.map(({name}, colour) =>
    make("span", {}, make("span", {class: `key c${colour}`}, name), " ", now[colour]));
  const root = make("figure", {}, svg, make("figcaption", {}, make("strong", {}, title), ...keys, ...films.length > 1 ? [`${names[0]} dashed`] : []));
  return {root, show(moment) {
    cursor.setAttribute("x1", across(moment));
    cursor.setAttribute("x2", across(moment));
    const here = films.map((_, index) => at(moment, index));
    series.forEach(({of}, index) => {
      now[index].textContent = here.map((one) => one && of(one.frame) != null ? show(of(one.frame)) : "–").join(" | ");
    });
    svg.setAttribute("aria-label", `${title}: ${series.map(({name}, index) => `${name} ${now[index].textContent}`).join(", ")}`);
  }};
}

// --- the page

/** The first moment of every scene. */
const starts = moments.flatMap((_, moment) => {
  const {scene} = first(moment), before = moment ? first(moment - 1).scene : null;
  return before && called(before) === called(scene) ? [] : [[moment, scene]];
});

function strip() {
  return starts.map(([start, scene], number) => {
    const end = (starts[number + 1]?.[0] ?? moments.length) - 1;
    const last = films.map((_, index) => at(end, index)).filter((one) => one);
    const pictures = last.map(({frame}) => make("img", {alt: "", src: source(frame.finished ? frame.x : frame.x0)}));
    const button = make("button", {type: "button", onclick: () => go(end)}, make("span", {}, ...pictures),
      make("span", {}, called(scene)), make("small", {}, `${end - start + 1} steps, ${scene.model}`));
    return {root: make("li", {}, button),
      show: (moment) => button.setAttribute("aria-current", String(start <= moment && moment <= end))};
  });
}

function table(film, index) {
  const columns = Object.entries(measures), rows = new Map();
  const head = make("tr", {}, make("th", {scope: "col"}, "step"),
    ...columns.map(([name]) => make("th", {scope: "col"}, name)));
  moments.forEach((_, moment) => {
    const here = at(moment, index);
    if (here) rows.set(moment, make("tr", {}, make("th", {scope: "row"}, stepOf(here)),
      ...columns.map(([, of]) => make("td", {}, of(here)))));
  });
  const root = make("table", {}, make("caption", {}, films.length > 1 ? `${names[index]}: ${film.title}` : film.title),
    make("thead", {}, head), make("tbody", {}, ...rows.values()));
  return {root, show: (moment) => rows.forEach((row, at) => row.setAttribute("aria-current", String(at === moment)))};
}

const curves = [
  curve("Noise level", [{name: "sigma", of: (frame) => frame.sigma}], true),
  curve("Predictions", [{name: "x0", of: (frame) => frame.norms.x0}, {name: "eps", of: (frame) => frame.norms.eps},
    {name: "output", of: (frame) => frame.norms.out}]),
  curve("Guidance", [{name: "scale · (cond − uncond)", of: (frame) => frame.guided?.added},
    {name: "guided − cond", of: (frame) => frame.guided?.moved}]),
  curve("Time", [{name: "a step", of: (frame) => frame.seconds}], false, time),
  curve("Memory", [{name: "most in use", of: (frame) => frame.memory}], false, mebibytes),
].filter((one) => one);
const parts = {strip: strip(), films: films.map(column), curves, tables: films.map(table)};
for (const [id, list] of Object.entries(parts)) $(id).append(...list.map(({root}) => root));

function go(moment) {
  moment = Math.max(0, Math.min(moments.length - 1, moment));
  const here = first(moment), {shared} = moments[moment];
  const text = `${stepOf(here)}, sigma ${number(here.frame.sigma)} to ${number(here.frame.sigma_next)}${shared ? ", shared" : ""}`;
  $("slider").value = moment;
  $("slider").setAttribute("aria-valuetext", text);
  $("where").textContent = text;
  Object.values(parts).flat().forEach((part) => part.show(moment));
}

let timer = null;
function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => {
    const next = Number($("slider").value) + 1;
    if (next < moments.length) go(next); else play(false);
  }, 200) : null;
  $("play").setAttribute("aria-pressed", String(on));
  $("play").textContent = on ? "Pause" : "Play";
}

$("slider").max = Math.max(0, moments.length - 1);
$("slider").addEventListener("input", () => { play(false); go(Number($("slider").value)); });
$("play").addEventListener("click", () => {
  if (timer === null && Number($("slider").value) === moments.length - 1) go(0);
  play(timer === null);
});
$("words").hidden = !words.length;
$("words").append(...words.map((word) => make("button", {type: "button", "aria-pressed": "true", onclick: ({target}) => {
  hidden.has(word) ? hidden.delete(word) : hidden.add(word);
  target.setAttribute("aria-pressed", String(!hidden.has(word)));
  go(Number($("slider").value));
}}, word)));
if (moments.length) go(moments.length - 1);
