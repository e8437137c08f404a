"""The style sheet of every page."""

STYLE = """
:root { color-scheme: light dark;
  --bg: #fff; --fg: #1b1f24; --muted: #57606a; --line: #d0d7de; --soft: #f6f8fa;
  --after: #0969da; --good: #116329; --bad: #b91c24; --warn: #7d4e00; --tint: #fff8e5;
  --c0: #6e7781; --c1: #0072b2; --c2: #c24a00; --c3: #00795a; --c4: #a8457f;
  --c5: #8a6100; --c6: #2a7fb0; --c7: #5b4bb5; --c8: #1b1f24; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #0d1117; --fg: #e6edf3; --muted: #9da7b3; --line: #3d444d; --soft: #161b22;
  --after: #4c9bf5; --good: #56d364; --bad: #ff8e86; --warn: #e3b341; --tint: #272115;
  --c0: #8b949e; --c1: #58b4f0; --c2: #ff9152; --c3: #35c99d; --c4: #ea9fcb;
  --c5: #e8b93c; --c6: #9ad4f5; --c7: #b3a5ff; --c8: #e6edf3; } }
* { box-sizing: border-box; }
body { background: var(--bg); color: var(--fg); margin: 0; padding: 1rem;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, footer { max-width: 72rem; margin: 0 auto; }
.broad, .broad + footer { max-width: 96rem; }
footer { color: var(--muted); margin-top: 2rem; font-size: .85rem; }
h1 { font-size: 1.3rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .9rem; margin: .5rem 0; color: var(--muted); }
p, li, summary, figcaption, code { overflow-wrap: anywhere; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; }
.note, figcaption { color: var(--muted); font-size: .85rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: pre; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 500; white-space: normal; overflow-wrap: anywhere; min-width: 8rem;
  max-width: 24rem; }
td.long { white-space: pre-wrap; min-width: 12rem; max-width: 36rem; }
@media (max-width: 30rem) { .bounds { display: block; white-space: nowrap; }
  th, td { padding-right: .35rem; } tbody th { min-width: 5rem; } table { font-size: .8rem; } }
.n { text-align: right; } .in { padding-left: 1rem; font-weight: 400; }
tbody .in { color: var(--muted); }
.checks { border: 1px solid var(--line); border-left: .3rem solid; border-radius: .4rem;
  padding: .25rem 1rem 1rem; margin: 0 0 1rem; }
.checks.failed { border-left-color: var(--bad); } .checks.passed { border-left-color: var(--good); }
.checks h2 { margin: .5rem 0; } .failed h2 { color: var(--bad); } .passed h2 { color: var(--good); }
.checks tbody th { min-width: 9.5rem; }
.checks p { margin: .5rem 0 0; }
.warnings { background: var(--tint); border-left: .3rem solid var(--warn); border-radius: .4rem;
  padding: .5rem 1rem; margin: 1rem 0; }
.warnings ul { margin: 0; padding-left: 1.1rem; font-size: .9rem; }
.advice { background: var(--soft); border-left: .3rem solid var(--after); border-radius: .4rem;
  padding: .6rem 1rem; margin: 0 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.tiles div { background: var(--soft); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .9rem; display: flex; flex-direction: column; }
.tiles strong { font-size: 1.25rem; line-height: 1.3; }
.tiles span { color: var(--muted); font-size: .875rem; }
@media (max-width: 30rem) { .tiles { grid-template-columns: 1fr; gap: .4rem; }
  .tiles div { flex-flow: row wrap; justify-content: space-between; align-items: baseline;
    gap: 0 1rem; padding: .4rem .8rem; } .tiles strong { font-size: 1.1rem; } }
.halves { display: grid; gap: 1rem 2.5rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 60rem) { .halves { grid-template-columns: minmax(0, auto) minmax(20rem, 1fr); } }
figure { margin: 1rem 0; min-width: 0; }
.bars { margin: 0; display: grid; gap: .35rem; align-content: start; }
.bar { display: grid; grid-template-columns: 7rem 1fr 3rem; gap: .6rem; align-items: center;
  font-size: .875rem; font-variant-numeric: tabular-nums; }
.bar > :last-child { text-align: right; }
.track { background: linear-gradient(var(--line), var(--line)) 0 / var(--whole) 100% no-repeat;
  border-radius: .2rem; height: 1.1rem; overflow: hidden; }
.track i { display: block; height: 100%; background: var(--after); border-radius: .2rem; }
.charts { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 20rem), 1fr)); }
.charts figure { max-width: 25rem; margin: .5rem 0; }
.charts svg { width: 100%; height: auto; display: block; fill: currentColor; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .25rem 0; }
.key span { overflow-wrap: anywhere; } .key i { font-style: normal; }
.spread { margin: .5rem 0; } .spread div { display: flex; gap: 1rem; font-size: .875rem;
  justify-content: space-between; }
.spread div span { overflow-wrap: anywhere; } .spread b { white-space: nowrap; }
.spread svg { width: 100%; height: 2.5rem; display: block; border-bottom: 1px solid var(--line); }
.spread path { fill: var(--after); } .spread .mid { fill: var(--line); opacity: .5; }
.spread .median { stroke: var(--fg); stroke-width: 2; vector-effect: non-scaling-stroke; }
.axis { display: flex; justify-content: space-between; color: var(--muted); font-size: .8rem; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .9rem;
  margin: .75rem 0; min-width: 0; }
summary { cursor: pointer; font-weight: 500; }
.plain { list-style: none; padding: 0; font-size: .9rem; }
.directions { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 24rem), 1fr)); }
.weights { display: grid; grid-template-columns: 5.5rem repeat(var(--n), minmax(0, 1fr));
  gap: .3rem .6rem; font-size: .8rem; line-height: 1.3; align-items: center; max-width: 40rem; }
.weights img { width: 100%; height: 5rem; background: var(--bg);
  border: 1px solid var(--line); }
.key .dense, .key .thin, .key .gone { display: inline-block; width: 1rem; height: 1rem;
  vertical-align: -.15rem; margin-right: .35rem; border: 1px solid var(--line);
  background: rgb(36, 120, 204); }
.key .thin { background: rgba(36, 120, 204, .12); } .key .gone { background: rgba(213, 94, 0, .6); }
.weights .coarse { image-rendering: pixelated; }
.losses .loss-good { background: #2a93; } .losses .loss-fair { background: #d903; }
.losses .loss-bad { background: #d335; }
"""
