"""The report's style sheet: system fonts, two colour schemes, a phone's width first, and paper."""

STYLE = """
:root{
 --paper:#fbfaf7;--card:#fff;--ink:#1d1f23;--soft:#5c626b;--line:#dfdcd4;
 --accent:#0a5ea8;--heat:10 94 168;
 --good:#006b4f;--good-bg:#e3f2ec;--bad:#a63d00;--bad-bg:#fbe9df;
 --e0:#0072b2;--e1:#e69f00;--e2:#009e73;--e3:#cc79a7;--e4:#56b4e9;--e5:#d55e00;--e6:#8f8a1a;
 --t0:#fff;--t1:#111;--t2:#111;--t3:#111;--t4:#111;--t5:#111;--t6:#111;
}
@media (prefers-color-scheme:dark){:root{
 --paper:#15171a;--card:#1d2024;--ink:#e9e7e2;--soft:#a4a9b1;--line:#353a41;
 --accent:#6cb4f2;--heat:84 164 232;
 --good:#5fd0a5;--good-bg:#173229;--bad:#f4a274;--bad-bg:#3b2418;--e0:#3d9bd8;--e2:#19b88a;
 --e6:#c3bd45;--t0:#111;
}}
*{box-sizing:border-box}
data,.range,.small th:has(.badge){white-space:nowrap}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.5;
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 16px}
header{padding-top:36px}
.kicker{margin:0;color:var(--accent);font-weight:600;letter-spacing:.02em}
h1{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;margin:.15em 0 .5em;letter-spacing:-.02em}
h2{font-size:1.3rem;line-height:1.25;margin:0 0 .4em;letter-spacing:-.01em}
section{margin:40px 0;padding-top:24px;border-top:1px solid var(--line)}
#summary{border:0;padding:0;margin:24px 0}
p{max-width:68ch;margin:.5em 0}
#summary{display:grid;grid-template-columns:minmax(0,1fr) 320px;gap:28px;align-items:start}
.headline{font-size:1.06rem}
.headline p{margin:0 0 .7em}
.headline p:first-child{font-size:1.3rem;line-height:1.38;letter-spacing:-.005em}
.headline data{font-weight:600}
.cards{display:grid;grid-template-columns:1fr 1fr;gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.card strong{display:block;font-size:1.7rem;line-height:1.2;letter-spacing:-.02em}
.card span,small,.note,.quiet{color:var(--soft)}
.card span,.note,small{font-size:.8rem}
.card span{display:block;line-height:1.35}
.note{max-width:none}
dl{display:flex;flex-wrap:wrap;gap:6px 28px;margin:12px 0}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;overflow-wrap:anywhere}
dl.full{display:block}
ul.plain{list-style:none;margin:0;padding:0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85em}
code{overflow-wrap:anywhere}
td code{white-space:nowrap}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;margin:6px 0 14px;
 white-space:pre-wrap}
li::marker{color:var(--soft)}
.scroll{overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child{text-align:left;font-weight:500}
thead th{vertical-align:bottom;color:var(--soft);font-size:.85rem;font-weight:600}
th small,td small{display:block;font-weight:400;line-height:1.3}
td small{white-space:nowrap}
.matrix td{background:rgb(var(--heat) / var(--heat-share,0));border-left:2px solid var(--paper);
 border-bottom:2px solid var(--paper);min-width:84px}
.matrix td small{color:inherit;opacity:.78}
.matrix tbody th{border-bottom:2px solid var(--paper);min-width:128px}
.matrix td{white-space:nowrap}
.matrix td.own{box-shadow:inset 0 0 0 2px var(--ink)}
.matrix tr.main th{font-weight:700;color:var(--accent)}
.matrix .quiet td,.matrix .quiet th{background:none;font-weight:400}
.differences td.better{background:var(--good-bg);color:var(--good)}
.differences td.worse{background:var(--bad-bg);color:var(--bad)}
.variant th:first-child{font-weight:400;color:var(--soft);font-size:.85rem;padding-left:22px}
.costs{font-size:.92rem}
.facts th,.facts td{text-align:left;font-size:.9rem}
.facts tr.main th{color:var(--accent);font-weight:700}
.small{font-size:.92rem;margin-bottom:8px}
.small th,.small td{padding:4px 6px}
.files th{overflow-wrap:anywhere}
.files td{white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px;
 margin:14px 0}
.charts.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 12px 8px;
 min-width:0;break-inside:avoid}
figure .scroll{margin:0}
figcaption{font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}
figcaption small{margin-left:.5em;font-weight:400}
svg{display:block;width:100%;max-width:440px;height:auto;overflow:visible}
svg text{font-size:10px;fill:var(--ink)}
svg .tick{fill:var(--soft);font-size:9.5px}
svg .middle{text-anchor:middle}
svg .end{text-anchor:end}
svg .label.main{font-weight:700;fill:var(--accent)}
svg .label.own{font-weight:700}
.grid{stroke:var(--line);stroke-width:1}
.grid.zero{stroke:var(--ink);stroke-width:1.2}
.whisker{stroke:var(--soft);stroke-width:2;stroke-linecap:round}
.whisker.main,.dot.main,.whisker.sure,.dot.sure{stroke:var(--accent)}
.whisker.own,.dot.own{stroke:var(--ink)}
.dot{stroke:var(--soft);stroke-width:2;fill:var(--card)}
.dot.main,.dot.sure{fill:var(--accent)}
.dot.own{fill:var(--ink)}
.hit{fill:transparent}
.curve{fill:none;stroke:var(--accent);stroke-width:2.2;stroke-linejoin:round}
.curve.raw{stroke-width:1;opacity:.45}
.heat{fill:rgb(var(--heat))}
.scale{display:inline-flex;vertical-align:middle}
.scale span{width:14px;height:12px;background:rgb(var(--heat))}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 14px;padding:0;margin:6px 0;font-size:.85rem}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
.badge{display:inline-block;margin-left:6px;padding:0 7px;border-radius:9px;background:var(--good-bg);
 color:var(--good);font-size:.72rem;font-weight:600}
details{margin:12px 0}
summary{cursor:pointer;color:var(--accent)}
@media (max-width:860px){#summary{grid-template-columns:1fr;gap:12px}}
@media (max-width:560px){
 .matrix th:first-child{position:sticky;left:0;background:var(--paper);min-width:88px;z-index:1;
  font-size:.9rem;line-height:1.25}
 .matrix tbody th small{display:none}
 th,td{padding:6px 7px}
 .matrix td,.matrix thead th{min-width:62px;padding:6px 4px}
 .matrix th:first-child{padding-left:0}
 .matrix .variant th:first-child{padding-left:8px;font-size:.78rem}
 .matrix td small{font-size:.66rem;letter-spacing:-.02em}
 .headline p:first-child{font-size:1.15rem}
}
@media print{
 :root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--accent:#0a5ea8;--heat:10 94 168;
  --good:#006b4f;--good-bg:#e3f2ec;--bad:#a63d00;--bad-bg:#fbe9df;
  --e0:#0072b2;--e1:#e69f00;--e2:#009e73;--e3:#cc79a7;--e4:#56b4e9;--e5:#d55e00;--e6:#8f8a1a;
  --t0:#fff}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 html{font-size:10.5px}
 details::details-content{content-visibility:visible}
 summary{display:none}
 header,main{max-width:none;padding:0}
 section{margin:18px 0;padding-top:12px}
 h2{break-after:avoid}
 tr,figure,.card{break-inside:avoid}
 .scroll{overflow:visible}
 .charts{grid-template-columns:repeat(3,1fr)}
 .charts.wide{grid-template-columns:repeat(2,1fr)}
}
"""
