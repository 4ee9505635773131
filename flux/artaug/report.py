"""report.html, which stands alone (pictures are in it), and table.md: what the loop made, took and refused, and gave."""

import base64
import html
import io
import json
import re
from collections import Counter
from pathlib import Path

from PIL import Image

from flux import cli
from flux.resume import _write

STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#23262b;background:#fbfbf9;max-width:1080px;
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #dcdedf;text-align:left}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:1rem}
figure{margin:0;font-size:13px}figure img{width:49%;image-rendering:auto}figcaption{color:#555}
.accepted{border-left:4px solid #1f5fa8;padding-left:.6rem}.rejected{border-left:4px solid #c8642a;padding-left:.6rem}
pre{background:#f0f0ec;padding:.8rem;overflow:auto;font-size:13px}"""
SHOWN = 12  # accepted, and rejected, pairs of an iteration with pictures


def write(run: Path, history: list[dict], stop: str, settings, seconds: float) -> None:
    _write(run / "table.md", table(history) + "\n")
    parts = [f"<h1>ArtAug: {html.escape(settings.model)}</h1>", f"<p>{html.escape(stop or 'no stop rule held yet')}; "
             f"{seconds:.0f} s of this start.</p>", as_html(table(history))]
    for folder in sorted(run.glob("iteration-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        if (folder / "manifest.jsonl").exists():
            parts += iteration(folder)
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(cli.to_toml(settings))}</pre>"]
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ArtAug</title><style>{STYLE}</style></head>'
            f'<body>{"".join(parts)}</body></html>\n')
    _write(run / "report.html", page)


def interval(figures: list[float], digits: int = 2) -> str:
    mean, low, high = figures
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def table(history: list[dict]) -> str:
    """Markdown: held-out prompts after each iteration."""
    rows = ["| after iteration | score of 10 | gain (95 %) | win / tie / lose | fidelity | right, points (95 %) |",
            "|---|---|---|---|---|---|"]
    for each in history:
        figures = each["against"]
        wins = " / ".join(map(str, figures["wins"]))
        right = interval(figures["right"], 1) if "right" in figures else "-"
        cells = (str(each["iteration"]), f"{each['base score']:.2f} to {each['score']:.2f}", interval(figures["gain"]), wins,
                 interval(figures["fidelity"], 3), right)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def as_html(markdown: str) -> str:
    lines = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    head, _, *rows = lines
    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def iteration(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["decision"] == "accepted"]
    reasons = Counter(word(reason) for row in rows for reason in row["reasons"])
    gains = {name: sum(row["gains"][name] for row in rows) / len(rows) for name in rows[0]["gains"]}
    parts = [f"<h2>{folder.name}</h2><p>{len(rows)} pairs by {html.escape(rows[0]['critic'])}, {len(kept)} accepted. Mean "
             "gains before the filter: " + ", ".join(f"{name} {gain:+.3f}" for name, gain in gains.items()) + ".</p>",
             as_html("\n".join(["| why rejected | pairs |", "|---|---|",
                                *(f"| {name} | {count} |" for name, count in reasons.most_common())]))]
    told = [json.loads(path.read_text()) for path in sorted((folder / "groups").glob("group-*.json"))]
    ends = Counter(word(stage["end"] or "all steps") for each in told for stage in each["stages"].values())
    if told:
        parts.append(f"<p>{len(told)} groups trained, {sum(each['left_out'] for each in told)} left out; stages ended: "
                     + html.escape(", ".join(f"{name} {count}" for name, count in ends.items())) + ".</p>")
    for name, some in (("accepted", kept), ("rejected", [row for row in rows if row["reasons"]])):
        parts.append(f"<h3>{name}</h3><div class=pairs>" + "".join(pair(folder, row) for row in some[:SHOWN]) + "</div>")
    return parts


def word(reason: str) -> str:
    """The rule without its figures."""
    return re.match(r"[^\d:,-]*", reason)[0].strip()


def pair(folder: Path, row: dict) -> str:
    pictures = "".join(f'<img alt="{side}" src="{inline(folder / row["paths"][side])}">' for side in ("before", "after"))
    edits = "; ".join(f"{edit['aspect']}: {edit['prompt']}" for edit in row["plan"]["edits"])
    why = "; ".join(row["reasons"]) or ", ".join(f"{name} {gain:+.2f}" for name, gain in row["gains"].items())
    return (f"<figure class={row['decision']}>{pictures}<figcaption><b>{html.escape(row['prompt'])}</b><br>"
            f"{html.escape(edits)}<br>{html.escape(why)}</figcaption></figure>")


def inline(path: Path, edge: int = 256) -> str:
    """A picture as a data URI, no larger than `edge` pixels."""
    with Image.open(path) as pil:
        small = pil.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
