// Draws the faces of this folder in colour, and again as line drawings, and lists what is on them.
//
//     npm install facesjs@5.0.3 @resvg/resvg-js@2.6.2 sharp@0.35.5
//     node draw.mjs [FOLDER]
//
// A sheet is a WebP picture of 32 x 32 faces, row by row, each of 64 x 64 pixels. Ten sheets are the training set,
// and one is the test set. A face depends on its number alone.

import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Resvg } from '@resvg/resvg-js';
import { faceToSvgString, generate } from 'facesjs';
import sharp from 'sharp';

const SIDE = 64; // pixels of a face
const ACROSS = 32; // faces in a row of a sheet, and rows
const TRAIN = 10; // sheets

const SKIN = {
  light: ['#f2d6cb', '#ddb7a0', '#fedac7'],
  tan: ['#f0c5a3', '#eab687', '#d9a066'],
  brown: ['#bb876f', '#aa816f', '#a67358'],
  dark: ['#ad6453', '#74453d', '#5c3937'],
};
const HAIR = {
  black: ['#272421', '#0f0902', '#1c1008'],
  brown: ['#3d2314', '#5a3825', '#8a5a2b'],
  red: ['#b55239', '#8f3b1b', '#c8703c'],
  blond: ['#cc9966', '#e9c67b', '#d7bf91'],
  grey: ['#9a9a9a', '#c4c4c4', '#e6e6e6'],
};
// How often each colour of hair comes with each colour of skin: once for each time it is listed.
const NATURAL = {
  light: ['black', 'brown', 'brown', 'red', 'blond', 'blond'],
  tan: ['black', 'brown', 'blond'],
  brown: ['black', 'black', 'brown'],
  dark: ['black', 'black', 'brown'],
};
const GREY = { young: 0, adult: 0.05, old: 0.8 }; // the share of grey hair
const GLASSES = ['glasses1-primary', 'glasses1-secondary', 'glasses2-black', 'glasses2-primary', 'glasses2-secondary'];
const FOREHEADS = ['forehead1', 'forehead2', 'forehead3', 'forehead4', 'forehead5', 'none'];

// The generator mulberry32: a function that gives numbers in [0, 1), from a seed of 32 bits.
function randomNumbers(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

function hex(colour) {
  return '#' + colour.map((v) => Math.max(0, Math.min(255, Math.round(v))).toString(16).padStart(2, '0')).join('');
}

// Face number `number`: what facesjs draws, the colour behind it, and the row of the list.
function makeFace(number) {
  const random = randomNumbers(Math.imul(number + 1, 0x9e3779b1));
  Math.random = random; // facesjs takes no seed
  const choose = (list) => list[Math.floor(list.length * random())];
  const between = (low, high) => low + (high - low) * random();
  const vary = (colour) => {
    const lighter = between(-14, 14);
    return hex([1, 3, 5].map((k) => parseInt(colour.slice(k, k + 2), 16) + lighter + between(-5, 5)));
  };
  const gender = choose(['female', 'male']);
  const age = choose(['young', 'adult', 'adult', 'old']);
  const skin = choose(Object.keys(SKIN));
  const hairColour = random() < GREY[age] ? 'grey' : choose(NATURAL[skin]);
  const face = generate({}, { gender });
  face.accessories.id = 'none'; // hats would hide the hair
  face.glasses.id = random() < 0.25 ? choose(GLASSES) : 'none';
  face.body.color = vary(choose(SKIN[skin]));
  face.hair.color = vary(choose(HAIR[hairColour]));
  face.teamColors = [0, 1, 2].map(() => hex([0, 1, 2].map(() => between(0, 255))));
  if (face.nose.id === 'pinocchio') face.nose.id = 'small';
  if (age === 'young') {
    face.eyeLine.id = face.smileLine.id = face.facialHair.id = 'none';
    if (!/blush|freckles/.test(face.miscLine.id)) face.miscLine.id = 'none';
  }
  if (age === 'old') {
    face.eyeLine.id = `line${1 + Math.floor(6 * random())}`;
    face.smileLine = { id: `line${1 + Math.floor(4 * random())}`, size: between(0.8, 2.2) };
    face.miscLine.id = choose(FOREHEADS);
  }
  const row = {
    face: number,
    gender,
    age,
    skin,
    hair_colour: hairColour,
    hair: face.hair.id,
    long_hair: face.hairBg.id === 'none' ? 'no' : 'yes',
    facial_hair: face.facialHair.id,
    glasses: face.glasses.id,
    eyes: face.eye.id,
    mouth: face.mouth.id,
    smile: face.mouth.id.startsWith('smile') ? 'yes' : 'no',
  };
  return { face, background: hex([0, 1, 2].map(() => between(140, 250))), row };
}

// The pixels (64, 64, 3) of a face; as a line drawing, all is white but the lines, which are wider.
function draw(face, background, lines) {
  if (lines) {
    face.body.color = face.hair.color = background = '#ffffff';
    face.teamColors = [background, background, background];
    face.head.shave = 'rgba(0,0,0,0)';
  }
  let svg = faceToSvgString(face);
  svg = svg.replace(/width="100%" height="100%" viewBox="[^"]*"/, 'width="400" height="400" viewBox="-30 62 460 460"');
  if (lines) {
    svg = svg.replace(/(stroke-width[=:]"?)([\d.]+)/g, (_, name, width) => name + 1.5 * width);
    svg = svg.replace(/stroke="#000"(?=[^>]*>)(?![^>]*stroke-width)/g, 'stroke="#000" stroke-width="6"');
  }
  const { pixels } = new Resvg(svg, { fitTo: { mode: 'width', value: SIDE }, background }).render();
  const rgb = Buffer.alloc(3 * SIDE * SIDE);
  for (let i = 0; i < SIDE * SIDE; i++) for (let k = 0; k < 3; k++) rgb[3 * i + k] = pixels[4 * i + k];
  return rgb;
}

function paste(sheet, pixels, place) {
  const top = SIDE * Math.floor(place / ACROSS);
  const left = SIDE * (place % ACROSS);
  for (let y = 0; y < SIDE; y++) {
    pixels.copy(sheet, 3 * ((top + y) * SIDE * ACROSS + left), 3 * SIDE * y, 3 * SIDE * (y + 1));
  }
}

const folder = process.argv[2] ?? '.';
const raw = { width: SIDE * ACROSS, height: SIDE * ACROSS, channels: 3 };
const rows = { train: [], test: [] };
for (let sheet = 0; sheet <= TRAIN; sheet++) {
  const part = sheet < TRAIN ? 'train' : 'test';
  const colour = Buffer.alloc(3 * raw.width * raw.height);
  const lines = Buffer.alloc(colour.length);
  for (let place = 0; place < ACROSS ** 2; place++) {
    const { face, background, row } = makeFace(sheet * ACROSS ** 2 + place);
    rows[part].push(row);
    paste(colour, draw(face, background, false), place);
    paste(lines, draw(face, background, true), place);
    if (place % 200 === 0) await new Promise(setImmediate); // lets node free memory
  }
  for (let i = 0; i < lines.length; i++) lines[i] = Math.round(Math.round((lines[i] * 7) / 255) * (255 / 7)); // 8 greys
  const name = join(folder, `${part}_${String(sheet % TRAIN).padStart(2, '0')}`);
  await sharp(colour, { raw }).webp({ quality: 85, effort: 6, smartSubsample: true }).toFile(`${name}.webp`);
  await sharp(lines, { raw }).webp({ lossless: true, effort: 6 }).toFile(`${name}_lines.webp`);
}
for (const [part, list] of Object.entries(rows)) {
  const table = [Object.keys(list[0]), ...list.map(Object.values)];
  writeFileSync(join(folder, `${part}.csv`), table.map((row) => row.join(',') + '\n').join(''));
}
