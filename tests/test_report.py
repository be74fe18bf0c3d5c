"""The report: the page holds what the run folders hold, text stays text, and a real browser draws and filters."""

import csv
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

from grpo import report

ATTACK = "</script><script>alert(1)</script><!-- <b>&amp; \u2028 \ud800"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def write_run(folder, *, seed=0, lr=0.1, rewards=(0.5, 1.0), steps=2):
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "optim": {"lr": lr, "betas": [0.9, 0.99]}}))
    rows = [
        {"step": step, "reward": rewards[step % 2 - 1], "tokens": 10, "seconds/rollout": 2.0, "kl": None, "novel": step}
        for step in range(1, steps + 1)
    ]
    rows[-1]["validation/accuracy"] = 0.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"accuracy": 0.75, "interval": [0.5, 0.9], "problems": 8}
    (folder / "summary.json").write_text(json.dumps({"results": {"after": entry}, "best_step": 2, "seconds": {"a": 1}}))
    (folder / "completions").mkdir()
    for step in range(1, steps + 1):
        write_completions(folder / "completions" / f"step_{step}.jsonl", step)
    return folder


def write_completions(path, step):
    """Two problems, two samples each: the first of each is paid; the last timed out at the limit, unscored."""
    lines = []
    for problem in ("p/0", "p/1"):
        for sample in (0, 1):
            failed = (problem, sample) == ("p/1", 1)
            record = {"problem": problem, "sample": sample, "prompt": f"{problem}?{ATTACK}", "answer": "7"}
            record |= {
                "completion": f"{step} {problem} {sample} {ATTACK}",
                "finish_reason": "length" if failed else "eos",
            }
            record |= {
                "rewards": {"format": None if failed else 1.0 - sample},
                "reward": float("nan") if failed else 1.0 - sample,
            }
            record |= {"status": {"format": "timeout" if failed else "ok"}, "advantage": 0.5 - sample}
            tokens = {"tokens": ["un", "likely" + ATTACK], "logprobs": [-0.01, -4.0]} if problem == "p/0" else {}
            lines.append(json.dumps(record | tokens, ensure_ascii=False).replace("\ud800", "\\ud800") + "\n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / "a0"),
        write_run(tmp_path / "a1", seed=1, rewards=(0.7, 0.0)),
        write_run(tmp_path / "b", lr=0.2),
    ]


@pytest.fixture
def shots(tmp_path):
    entries = {str(n): {"accuracy": n / 10, "interval": [0.0, 0.5], "problems": 20} for n in (0, 4)}
    (tmp_path / "eval.json").write_text(json.dumps({"models": {"tuned": entries}}))
    return tmp_path / "eval.json"


def collect(folders, evals=(), steps=20, groups=8):
    return report.collect(folders, evals, steps=steps, groups=groups)


class Scripts(HTMLParser):
    """What each script element of a page holds, as a browser's parser sees it."""

    def __init__(self, text):
        super().__init__()
        self.found, self.is_open = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.found.append("")
            self.is_open = True

    def handle_endtag(self, tag):
        self.is_open = self.is_open and tag != "script"

    def handle_data(self, data):
        if self.is_open:
            self.found[-1] += data


def test_runs_whose_configs_differ_by_the_seed_only_are_one_group(folders):
    data = collect(folders)
    assert data["groups"] == [[0, 1], [2]]
    assert data["config"] == {"optim.lr": [0.1, 0.1, 0.2], "seed": [0, 1, 0]}
    assert [run["name"] for run in data["runs"]] == ["a0", "a1", "b"]


def test_runs_of_one_name_are_told_apart_by_their_folders(folders, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_run(tmp_path / "other" / "a0")
    assert [run["name"] for run in collect([folders[0], other])["runs"]] == [str(folders[0]), str(other)]


def test_the_data_hold_what_the_run_folder_holds(folders, shots):
    data = collect(folders, [shots])
    run = data["runs"][1]
    assert run["metrics"]["reward"] == [0.7, 0.0] and run["metrics"]["validation/accuracy"] == [None, 0.25]
    assert run["accuracy"] == [{"when": "after", "accuracy": 0.75, "low": 0.5, "high": 0.9, "problems": 8}]
    assert (run["tokens"], run["seconds"], run["best_step"]) == (20, {"a": 1}, 2)
    assert data["shots"][1] == {"model": "tuned", "shots": 4, "accuracy": 0.4, "low": 0.0, "high": 0.5, "problems": 20}
    assert data["definitions"]["reward"].startswith("mean weighted reward") and data["definitions"]["novel"] is None


def test_a_run_that_is_not_finished_has_seconds_from_its_metrics(folders):
    (folders[0] / "summary.json").unlink()
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "seconds/evaluation": 1.5}\n')
    run = collect(folders[:1])["runs"][0]
    assert run["seconds"] == {"rollout": 4.0, "evaluation": 1.5} and run["tokens"] == 20
    assert (run["accuracy"], run["best_step"]) == ([], None)


def test_a_line_of_metrics_that_is_being_written_is_left_out(folders):
    whole = collect(folders[:1])["runs"]
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rewa')
    assert collect(folders[:1])["runs"] == whole


def test_completions_are_of_evenly_spread_steps_the_first_and_the_last_among_them(tmp_path):
    run = collect([write_run(tmp_path / "long", steps=10)], steps=4, groups=1)["runs"][0]
    assert [(group["step"], group["problem"]) for group in run["completions"]] == [(s, "p/0") for s in (1, 4, 7, 10)]
    assert (run["steps_shown"], run["steps_recorded"], run["groups_shown"]) == (4, 10, 1)
    for steps, shown in ((1, [1]), (2, [1, 10])):
        run = collect([tmp_path / "long"], steps=steps, groups=1)["runs"][0]
        assert [group["step"] for group in run["completions"]] == shown
    first = run["completions"][0]
    assert [sample["sample"] for sample in first["samples"]] == [0, 1]
    assert "prompt" in first and "prompt" not in first["samples"][0], "a prompt is embedded once for its group"


def test_of_long_completions_beginning_and_end_are_shown(tmp_path):
    """Thousands of tokens in hundreds of completions made pages of 89 MB and more."""
    folder = write_run(tmp_path / "run", steps=1)
    path = folder / "completions" / "step_1.jsonl"
    first, *others = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
    tokens = [f"{i:03}" for i in range(1000)]
    first |= {"completion": "".join(tokens), "tokens": tokens, "logprobs": [-0.001 * i for i in range(1000)]}
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, *others)), encoding="utf-8")
    run = report.collect([folder], steps=1, groups=8, characters=100)["runs"][0]
    long, short = run["completions"][0]["samples"]
    gap = "\n[... 2,900 characters left out ...]\n"
    assert long["completion"] == "".join(tokens)[:50] + gap + "".join(tokens)[-50:]
    assert long["tokens"] == [*tokens[:16], gap, *tokens[-16:]]  # whole ones
    assert long["logprobs"][:16] == first["logprobs"][:16] and long["logprobs"][17:] == first["logprobs"][-16:]
    assert short["completion"] == others[0]["completion"] and short["tokens"] == others[0]["tokens"]
    assert run["characters_shown"] == 100
    assert report.collect([folder], steps=1, groups=8, characters=3000)["runs"][0]["characters_shown"] is None


def test_nothing_that_a_model_wrote_ends_the_script_element_that_holds_the_data(folders):
    data = collect(folders)
    scripts = Scripts(report.page(data)).found
    assert len(scripts) == 2
    assert json.loads(scripts[0]) == data
    assert data["runs"][0]["completions"][0]["samples"][0]["completion"] == f"1 p/0 0 {ATTACK}"


def test_what_could_not_be_scored_is_null_in_the_page(folders):
    assert collect(folders)["runs"][0]["completions"][1]["samples"][1]["reward"] is None
    assert "NaN" not in Scripts(report.page(collect(folders))).found[0]


def test_the_page_asks_the_network_for_nothing():
    page = report.TEMPLATE.read_text()
    assert "default-src 'none'" in page
    assert not [word for word in ("src=", "href=", "@import", "url(", "fetch(") if word in page]


def test_the_csv_files_hold_the_same_numbers(folders, shots, tmp_path, capsys):
    out, folder = tmp_path / "page.html", tmp_path / "tables"
    assert report.main([*map(str, folders), "--evals", str(shots), "--out", str(out), "--csv", str(folder)]) == 0
    assert str(out) in capsys.readouterr().out and out.is_file()
    tables = {path.stem: list(csv.DictReader(path.open())) for path in folder.iterdir()}
    assert [(row["run"], row["step"], row["reward"]) for row in tables["metrics"][2:4]] == [
        ("a1", "1", "0.7"),
        ("a1", "2", "0.0"),
    ]
    assert tables["metrics"][0]["validation/accuracy"] == "" and tables["metrics"][0]["kl"] == ""
    assert tables["accuracy"][2] == {
        "run": "b",
        "when": "after",
        "accuracy": "0.75",
        "low": "0.5",
        "high": "0.9",
        "problems": "8",
    }
    assert tables["seconds"][0] == {"run": "a0", "phase": "a", "seconds": "1"}
    assert [row["accuracy"] for row in tables["shots"]] == ["0.0", "0.4"]
    assert tables["config"][0] == {"key": "optim.lr", "a0": "0.1", "a1": "0.1", "b": "0.2"}


def test_a_report_is_written_into_the_first_run_and_may_be_written_again(folders, tmp_path, capsys):
    whole = report.page(collect(folders))
    for _ in range(2):
        assert report.main([*map(str, folders), "--csv", str(tmp_path / "deep" / "tables")]) == 0
    assert (folders[0] / "report.html").read_text(encoding="utf-8") == whole
    assert (tmp_path / "deep" / "tables" / "metrics.csv").read_text().startswith("run,step,")
    capsys.readouterr()
    assert report.main([str(folders[1])]) == 0
    assert capsys.readouterr().out == f"written: {folders[1]}/report.html\n"


@pytest.mark.parametrize("option", ["--steps", "--groups"])
def test_a_report_of_no_steps_or_groups_is_refused(folders, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(folders[0]), option, "0"])
    assert "must be 1 or more" in capsys.readouterr().err


def test_what_is_no_run_folder_and_no_evaluation_is_refused_by_name(folders, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no metrics.jsonl and config.yaml; name a run folder" in capsys.readouterr().err
    assert report.main([str(folders[0]), "--evals", str(folders[0] / "summary.json")]) == 2
    assert "holds no results of eval.py" in capsys.readouterr().err
    assert report.main([str(folders[0]), "--evals", __file__]) == 2
    assert f"{__file__} is not JSON" in capsys.readouterr().err
    (folders[0] / "metrics.jsonl").write_text("")
    assert report.main([str(folders[0])]) == 2
    assert "holds no step yet; leave this run out" in capsys.readouterr().err


# --- in a browser ---

PROBE = """<script>
const pick = (id, value, type) => { at(id).value = value; at(id).dispatchEvent(new Event(type)); };
const texts = query => [...document.querySelectorAll(query)].map(found => found.textContent);
const curve = () => document.querySelector("#curves [data-keys=reward] path[stroke-width]").getAttribute("d");
const seen = {panels: texts("#curves h3"), more: texts("#more h3"), config: texts("#config td"),
  bars: texts("#results .value"), accuracy: texts("#results td").slice(0, 5),
  spans: [...document.querySelectorAll("#results td svg path")].map(path => path.getAttribute("d")),
  line: curve(), all: texts(".sample pre"), shown: at("shown").textContent, title: document.title,
  about: texts("#curves [data-keys=reward] details p")[0],
  bands: document.querySelectorAll("#curves [data-keys=reward] path[opacity='0.2']").length,
  grounds: [...document.querySelectorAll(".sample pre span")].slice(0, 2).map(span => span.style.background)};
pick("smoothing", 0, "input");
seen.unsmoothed = curve();
document.querySelector("#curves [data-keys=reward] .chart").dispatchEvent(new MouseEvent("mousemove", {clientX: 0}));
seen.tip = texts("#curves [data-keys=reward] .tip")[0];
const chart = document.querySelector("#curves [data-keys=reward] .chart"), tips = [];
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft"]) {
  chart.dispatchEvent(new KeyboardEvent("keydown", {key}));
  tips.push(chart.querySelector(".tip").textContent.slice(0, 6));
}
seen.tips = tips; seen.reached = chart.tabIndex;
pick("filter-low", 0.5, "input"); seen.paid = texts(".sample pre");
pick("filter-low", "", "input"); pick("filter-status", "timeout", "change"); seen.late = texts(".sample");
pick("filter-status", "", "change"); pick("filter-finish", "eos", "change"); seen.ended = at("count").textContent;
pick("filter-step", "", "change"); seen.steps = at("count").textContent;
pick("filter-text", "1 P/0", "input"); seen.search = texts(".sample pre"); pick("filter-run", 2, "change");
seen.other = at("count").textContent; seen.otherShown = at("shown").textContent;
pick("filter-text", "nowhere", "input"); seen.none = texts("#completions");
at("theme").click(); seen.theme = document.documentElement.style.colorScheme; at("theme").click();
seen.again = document.documentElement.style.colorScheme; seen.scripts = document.scripts.length;
document.body.replaceChildren(node("pre", {id: "seen"}, JSON.stringify(seen)));
</script></body>"""


SHOW = "<script>document.body.replaceChildren(node('pre', {id: 'seen'}, JSON.stringify(FOUND)));</script></body>"


def look(data, probe, folder):
    """What a script at the end of the page finds, in a headless browser."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path")
    page = folder / "page.html"
    page.write_text(report.page(data).replace("</body>", probe), encoding="utf-8")
    offline = [f"disable-{what}" for what in ("background-networking", "component-update", "sync", "quic")]
    options = ["headless", "no-sandbox", "disable-gpu", "no-first-run", *offline, f"user-data-dir={folder}/browser"]
    options = [f"--{option}" for option in [*options, "dump-dom"]]
    printed = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', printed, re.DOTALL)
    assert found, "a script on the page failed"
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def seen(folders, shots, tmp_path):
    """What a script that uses every control finds."""
    return look(collect(folders, [shots]), PROBE, tmp_path)


def test_a_browser_draws_a_run_of_a_great_many_steps(folders, tmp_path):
    data = collect(folders[:1])
    data["runs"][0]["metrics"] = {"step": list(range(1, 200_001)), "reward": [0.5, 1.0] * 100_000}
    data["definitions"] = {"step": "", "reward": ""}
    titles = "[...document.querySelectorAll('#curves h3')].map(title => title.textContent)"
    assert look(data, SHOW.replace("FOUND", titles), tmp_path) == ["reward"]


def test_a_browser_draws_values_that_differ_by_rounding_alone(folders, tmp_path):
    """The mean of three seeds is off by the last bit: so small a range, far from 0, had endlessly many ticks."""
    data = collect(folders)
    data["groups"] = [[0, 1, 2]]
    data["definitions"] |= {"mismatch_kl": "", "tiny": ""}
    for run in data["runs"]:
        run["metrics"] |= {"mismatch_kl": [-1e-8, -1e-8], "tiny": [5e-324, 0.0]}
    marks = "[...document.querySelectorAll('#more [data-keys=mismatch_kl] text')].map(text => text.textContent)"
    assert "0" in look(data, SHOW.replace("FOUND", marks), tmp_path)


def test_a_browser_shows_a_run_without_completions_and_validation(folders, tmp_path):
    shutil.rmtree(folders[0] / "completions")
    (folders[0] / "summary.json").unlink()
    shown = "[at('completions').textContent, at('results').textContent, !!at('config')]"
    found = look(collect(folders[:1]), SHOW.replace("FOUND", shown), tmp_path)
    assert found == ["This run has recorded no completions.", "", False], "nor is there a config to differ from"


def test_what_the_embedded_base_is_compared_with_has_its_name(folders):
    path = folders[0] / "summary.json"
    summary = json.loads(path.read_text())
    summary["results"]["supervised"] = summary["results"]["after"]
    path.write_text(json.dumps(summary))
    whens = lambda: [entry["when"] for entry in collect(folders[:1])["runs"][0]["accuracy"]]
    assert whens() == ["after", "supervised instead"]
    config = yaml.safe_load((folders[0] / "config.yaml").read_text()) | {"base": {"habit_steps": 40}}
    (folders[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert whens() == ["after", "before the habit"]


def test_a_browser_shows_the_last_step_of_the_first_run_where_another_went_on(folders, tmp_path):
    data = collect([folders[0], write_run(tmp_path / "longer", steps=3)])
    assert look(data, SHOW.replace("FOUND", "at('count').textContent"), tmp_path) == "4 completions in 2 groups"


def test_a_browser_draws_filters_and_keeps_text_as_text(seen):
    assert seen["panels"] == ["reward", "validation", "KL to the reference, nats", "seconds a step"]
    assert seen["more"] == ["novel", "tokens"], "a key that no panel names has a panel of its own"
    assert seen["shown"].startswith("a0: 2 of 2 steps, at most 8 groups of each; the run's folder")
    assert seen["otherShown"].startswith("b: 2 of 2 steps")
    assert seen["title"] == "a0, a1, b: GRPO report"
    assert seen["about"].startswith("reward: mean weighted reward") and " Healthy: rises" in seen["about"]
    assert seen["tips"] == ["step 2", "step 2", "step 1"] and seen["reached"] == 0, "by keyboard, too"
    assert seen["bands"] == 1, "two seeds are a band, one run is none"
    assert seen["line"] != seen["unsmoothed"]
    assert seen["tip"] == "step 1\na0, a1: 0.6 (0.5 to 0.7)\nb: 0.5"
    assert seen["config"] == ["optim.lr", "0.1", "0.1", "0.2", "seed", "0", "1", "0"]
    assert seen["accuracy"] == ["a0, after", "75.0%", "50.0% to 90.0%", "8", ""] and len(seen["spans"]) == 3
    assert seen["spans"][0].startswith("M120 ") and "H214.4" in seen["spans"][0], "0.5 to 0.9 of 236 from 2"
    assert seen["bars"] == ["0", "40"]
    assert len(seen["all"]) == 4, "the last step is shown first"
    assert seen["all"][0] == "unlikely" + ATTACK and seen["all"][2].startswith("2 p/1 0 </script>")
    assert "0%" in seen["grounds"][0] and "75%" in seen["grounds"][1]
    assert seen["scripts"] == 3, "the data, the page's script and this probe: no other"
    assert len(seen["paid"]) == 2 and seen["paid"][1].startswith("2 p/1 0 ")
    assert len(seen["late"]) == 1 and "format timeout; ended by length" in seen["late"][0]
    assert seen["ended"] == "3 completions in 2 groups"
    assert seen["steps"] == "6 completions in 4 groups"
    assert len(seen["search"]) == 2
    assert seen["other"] == "2 completions in 1 group"
    assert seen["none"] == ["No completion of this run passes these filters."]
    assert {seen["theme"], seen["again"]} == {"light", "dark"}
