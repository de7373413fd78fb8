"""The look of the page: light and dark, wide and narrow, on screen and on paper."""

CSS = """
:root { color-scheme: light dark; --paper: #f5f6f8; --card: #fff; --ink: #1c2330; --muted: #5d677a;
  --line: #dfe3ea;
  --accent: #2f5bd0; --wrong: #c2382c; --right: #1b8058; --amber: #b86e00; --note: #fff7e6;
  --note-line: #efcf8d;
  --soft: #eef1f6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #11141a; --card: #191d25; --ink: #e7eaf0; --muted: #9aa5b8; --line: #2f3642;
  --accent: #88a8ff;
    --wrong: #f27d70; --right: #55c596; --amber: #f0b254; --note: #2a2314; --note-line: #5d4a1f;
  --soft: #222833; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
header .kicker { color: var(--muted); font-size: 14px; margin: 0 0 10px; }
header .kicker b { color: var(--ink); font-weight: 600; }
h1 { font-size: clamp(23px, 3.3vw, 34px); line-height: 1.25; letter-spacing: -.015em; font-weight: 650;
  margin: 0 0 24px;
  max-width: 27em; text-wrap: pretty; }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0; font-weight: 650; }
p { margin: 0 0 14px; max-width: 46em; text-wrap: pretty; }
p.lead { color: var(--muted); margin-bottom: 20px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 26px 0 0; font-size: 14px; }
section { margin-top: 56px; scroll-margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
.note { background: var(--note); border: 1px solid var(--note-line); border-radius: 10px;
  padding: 12px 16px;
  margin: 0 0 14px; max-width: none; }
.note b { font-weight: 650; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin: 24px 0 0; }
.tile .what { color: var(--muted); font-size: 13px; }
.tile .figure { font-size: 28px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3;
  white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile .figure small { font-size: 15px; font-weight: 500; color: var(--muted); letter-spacing: 0; }
.tile .was { color: var(--muted); font-size: 13px; }
.good { color: var(--right); } .bad { color: var(--wrong); } .doubt { color: var(--amber); }
  .quiet { color: var(--muted); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 6px 20px;
  margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: 13px; vertical-align: bottom; }
th, td { padding: 8px 22px 8px 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child { min-width: 120px; }
.n { text-align: right; white-space: nowrap; }
td small { color: var(--muted); font-size: 12.5px; margin-left: 6px; }
td b { font-weight: 650; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px 24px;
  margin: 0 0 14px; }
dt { color: var(--muted); font-size: 13px; } dd { margin: 0; font-size: 17px; font-weight: 600;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px;
  align-items: start;
  margin: 0 0 14px; }
.pair > *, .pair .scroll { margin: 0; }
figure { margin: 0; } figure.card { margin: 0 0 14px; } figure svg { display: block; width: 100%;
  height: auto; }
figcaption { font-size: 14px; font-weight: 600; margin-bottom: 10px; }
figcaption span { display: block; font-weight: 400; color: var(--muted); font-size: 13px; }
.wide { overflow-x: auto; } .wide > svg { min-width: 640px; }
.scenario { display: grid; grid-template-columns: 200px 1fr; gap: 8px 26px; margin: 0 0 12px; }
.scenario .label { font-size: 17px; font-weight: 650; line-height: 1.3; overflow-wrap: anywhere; }
.scenario .label small { font-size: 13px; font-weight: 400; color: var(--muted); }
.scenario .facts { font-size: 13px; color: var(--muted); margin-top: 6px; display: flex; flex-wrap: wrap;
  gap: 0 16px; }
.scenario .purity { font-size: 13px; color: var(--muted); }
.scenario .facts b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.scenario > * { min-width: 0; }
.meter { display: block; height: 5px; border-radius: 3px; background: var(--soft); margin: 8px 0 4px;
  overflow: hidden;
  max-width: 180px; }
.meter i { display: block; height: 100%; background: var(--right); }
  .meter i.low { background: var(--amber); }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(74px, 1fr)); gap: 6px;
  align-content: start; }
.shot { position: relative; border-radius: 5px; overflow: hidden; background: #000; aspect-ratio: 1; }
.shot img { display: block; width: 100%; height: 100%; object-fit: cover; }
.shot img.small { image-rendering: pixelated; }
.shot span { position: absolute; top: 3px; min-width: 17px; padding: 0 4px; border-radius: 4px; color: #fff;
  font-size: 11.5px; line-height: 17px; font-weight: 650; text-align: center; background: #5d677a; }
.shot .before { left: 3px; } .shot .after { right: 3px; } .shot .wrong { background: #c2382c; }
  .shot .right { background: #1b8058; }
.shot .own { top: auto; bottom: 3px; left: 3px; background: #fff; color: #7a4a00;
  box-shadow: 0 0 0 1px #d99a2b; }
.small-shots .scenario { grid-template-columns: 230px 1fr; padding: 12px 16px; margin-bottom: 8px; }
.small-shots .shots { grid-template-columns: repeat(auto-fill, minmax(52px, 1fr)); gap: 4px; }
.small-shots .shot span { font-size: 10px; line-height: 14px; min-width: 14px; padding: 0 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--muted);
  margin: 0 0 14px; }
.legend i { display: inline-block; min-width: 17px; padding: 0 4px; margin-right: 6px;
  border-radius: 4px; color: #fff;
  font-size: 11.5px; line-height: 17px; font-weight: 650; text-align: center; font-style: normal;
  background: #5d677a; }
.legend .wrong { background: #c2382c; } .legend .right { background: #1b8058; }
.legend .own { background: #fff; color: #7a4a00; box-shadow: 0 0 0 1px #d99a2b; }
details { margin: 0 0 14px; } details > summary { cursor: pointer; color: var(--accent);
  margin: 0 0 10px; width: fit-content; }
details[open] > summary { margin-bottom: 12px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0 0 14px; }
@media (max-width: 760px) { main { padding: 24px 16px 60px; } .scenario,
  .small-shots .scenario { grid-template-columns: 1fr; }
  section { margin-top: 44px; } .scroll { padding: 4px 14px; } .card { padding: 14px; } th,
  td { padding-right: 16px; } }
@media print { body { background: #fff; } .scenario, figure.card, .tile { break-inside: avoid; }
  nav { display: none; } }
"""
