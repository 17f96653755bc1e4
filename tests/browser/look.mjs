// Open pages in headless Chromium at every width and in every colour scheme, and write what is wrong as JSON.
//
//   node look.mjs < REQUEST > FOUND
//
// REQUEST: {"chromium": PATH, "pages": [{"name", "url", "home", "paper"}], "widths": [1280, 390], "schemes": ["light", "dark"],
//           "pictures": FOLDER or null}
// `home` is what the address of every request has to begin with; with `paper` the page is looked at as it prints. FOUND: one record a page, width and scheme.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf-8");
const asked = JSON.parse(readFileSync(0, "utf-8"));
const browser = await chromium.launch({
  executablePath: asked.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});

async function look({ name, url, home, paper }, width, scheme) {
  const phone = width < 600;
  const context = await browser.newContext({
    viewport: { width, height: phone ? 844 : 800 }, colorScheme: scheme, isMobile: phone, hasTouch: phone,
    deviceScaleFactor: phone ? 2 : 1, reducedMotion: "reduce",
  });
  context.setDefaultTimeout(180_000); // machines are busy
  const page = await context.newPage();
  const errors = [], outside = [];
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("request", (request) => {
    if (!request.url().startsWith(home) && !/^(data|blob):/.test(request.url())) outside.push(request.url());
  });
  await page.goto(url, { waitUntil: "load" });
  if (asked.pictures) {
    const file = `${asked.pictures}/${name.replaceAll("/", "_")}-${width}-${scheme}`;
    await page.screenshot({ path: `${file}.png`, fullPage: true });
    if (scheme === "light" && !phone) await page.pdf({ path: `${file}.pdf`, format: "A4" });
  }
  // Folded parts are looked at, too; but listings of source code, which are all alike, take minutes.
  await page.evaluate(() => document.querySelectorAll("details:not(.mkdocstrings-source)").forEach((e) => (e.open = true)));
  const sideways = await page.evaluate(() => {
    const root = document.documentElement;
    return root.scrollWidth - root.clientWidth;
  });
  // A dot of a chart says its values when the keyboard reaches it, within the page.
  const mute = await page.evaluate(() => [...document.querySelectorAll(".dot")].filter((dot) => {
    dot.focus();
    const { left, right, width } = dot.querySelector(".tip").getBoundingClientRect();
    return document.activeElement !== dot || !width || left < 0 || right > document.documentElement.clientWidth;
  }).map((dot) => dot.getAttribute("aria-label")));
  const onPaper = paper ? await printed(page) : [];
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"], preload: false }));
  await context.close();
  return {
    page: name, width, scheme, sideways, errors, outside, mute, paper: onPaper,
    axe: violations.map((each) => ({
      rule: each.id, impact: each.impact, help: each.help, count: each.nodes.length,
      first: each.nodes[0].target.join(" "), why: each.nodes[0].failureSummary,
    })),
  };
}

// What is folded or dark on paper.
async function printed(page) {
  await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = false)));
  await page.emulateMedia({ media: "print" });
  // On a busy machine what is unfolded by the style of print has no height before a frame was drawn.
  await page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
  const found = await page.evaluate(() => {
    const folded = [...document.querySelectorAll("details")].filter((each) => !each.lastElementChild.checkVisibility(
      { contentVisibilityAuto: true, visibilityProperty: true }) || each.lastElementChild.offsetHeight === 0);
    const cut = [...document.querySelectorAll(".tall, .scroll")].filter((each) => each.scrollHeight > each.clientHeight + 2
      && getComputedStyle(each).overflowY !== "visible");
    const light = getComputedStyle(document.body).backgroundColor === "rgb(255, 255, 255)";
    return [...folded.map((each) => `folded: ${each.textContent.slice(0, 60)}`),
      ...cut.map((each) => `cut: ${each.getAttribute("aria-label")}`), ...(light ? [] : ["the ground is not white"])];
  });
  await page.emulateMedia({ media: "screen" });
  await page.evaluate(() => document.querySelectorAll("details").forEach((each) => (each.open = true)));
  return found;
}

const found = [];
for (const page of asked.pages)
  for (const width of asked.widths)
    for (const scheme of asked.schemes) found.push(await look(page, width, scheme));
await browser.close();
process.stdout.write(JSON.stringify(found, null, 1));
