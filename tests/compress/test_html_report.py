"""Pages of tiny runs and of a sweep, and what a browser makes of them."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from compress.cli import app
from compress.errors import InputError
from compress.html_report.figures import error_plot, short_kinds, size_plot, spread_plot
from compress.html_report.page import html_report, layer_rows, run_page, sweep_page, tiles, times
from compress.html_report.run_data import listed, place, run_data, trainings
from compress.html_report.samples import SampleRequest
from compress.html_report.sweep_data import frontier, short_names, sweep_data
from compress.pipeline import compress
from compress.progress import Reporter
from compress.recipe import read_recipe
from compress.run_dir import Finished
from compress.sweep import Request, sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert('$x$')</script> & \"más\""
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checked(HTMLParser):
    """Reads a page strictly: tags closed in order, ids once. Keeps its words, ids, links and tags."""

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.words = [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def checked(page):
    """A page that holds to what all pages do."""
    found = Checked(page)
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links if link != "data:,")
    assert not {"script", "iframe", "object", "img"} & set(found.tags)
    assert "url(http" not in page and "@import" not in page
    return found


@pytest.fixture(scope="module")
def pruned(llama_folder, text_file, tmp_path_factory):
    """A run that prunes, quantizes with a pattern of its own for no layer, and trains what is left."""
    out = tmp_path_factory.mktemp("run") / "small & fast"
    values = {
        "model": str(llama_folder),
        "pruner": "wanda",
        "quantizer": "rtn",
        "recover": "lrec",
        "recover_for": "256tokens",
        "options": {"lrec": {"seqlen": 32, "batch_size": 2, "rank": 2}},
        "calib": {"source": str(text_file), "nsamples": 2, "seqlen": 32},
        "target": {"sparsity": 0.5, "wbits": 4, "group_size": 32},
    }
    result = compress(read_recipe(None, values), llama_folder, out, Reporter(quiet=True))
    asked = {"text": str(text_file), "seqlen": 32, "max_windows": 4}
    Finished(out / "run").update(result | {"eval": {"asked": asked, "dense": 200.0, "compressed": 250.0}})
    return out


@pytest.fixture(scope="module")
def swept(llama_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    base = {"calib": {"source": str(text_file), "nsamples": 2, "seqlen": 32}}
    settings = ["wanda+rtn:target.group_size=32", "magnitude+rtn:target.group_size=32"]
    sweep(Request(str(llama_folder), settings, ["0.3"], ["2:4"], ["4"], base, None, str(text_file), 2, out), "cpu")
    return out


def test_the_page_of_a_run_says_what_was_asked_and_what_came_out(pruned):
    report = html_report(pruned, None, None)
    page = checked((pruned / "report.html").read_text())
    data, result = report.data, Finished(pruned / "run").read()
    assert data["page"] == str(pruned / "report.html") and json.loads(json.dumps(data)) is not None
    assert "small & fast" in page.text
    assert "Pruned to 50 % by wanda, quantized to 4 bits by rtn, recovered by lrec" in page.text
    for figure in ("250.00", "dense 200.00", "× 1.25", f"{result['layer_bits_per_weight']:.2f}", "50.0 %"):
        assert figure in page.text
    assert page.tags.count("svg") == 2 * 2  # training and errors, each for two widths; all layers have the same bits
    assert len(data["layers"]) == 3 * 7 and all(len(layer["steps"]) == 2 for layer in data["layers"])
    assert page.text.count("model.layers.") == 3 * 7
    assert "--eval-windows 4" in page.text


def test_the_recipe_on_the_page_is_the_run_s(pruned, tmp_path):
    data = run_data(pruned)
    shown = re.search(r'aria-label="recipe.toml">(.*?)</pre>', run_page(data | {"samples": []}), re.DOTALL)[1]
    (tmp_path / "recipe.toml").write_text(html.unescape(shown))
    assert read_recipe(tmp_path / "recipe.toml", {}) == read_recipe(pruned / "recipe.toml", {})
    assert data["command"].startswith("compress run --recipe recipe.toml --out 'small & fast' --eval")


def test_the_inner_folder_of_a_run_gives_the_same_data(pruned):
    assert run_data(pruned / "run") == run_data(pruned)


def test_the_command_prints_the_data_of_the_page(pruned, tmp_path, capsys):
    file = tmp_path / "page.html"
    app(["report", str(pruned), "-o", str(file), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(run_data(pruned))) | {
        "samples": [],
        "page": str(file),
    }
    assert checked(file.read_text())


def test_names_and_texts_are_escaped(pruned):
    data = run_data(pruned)
    data |= {"name": HOSTILE, "model": HOSTILE, "summary": HOSTILE, "recipe": HOSTILE, "notes": [HOSTILE]}
    data["layers"] = [layer | {"kind": HOSTILE, "layer": HOSTILE} for layer in data["layers"]]
    data["training"] = [training | {"method": HOSTILE} for training in data["training"]]
    data["samples"] = [{"prompt": HOSTILE, "dense": HOSTILE + "a", "compressed": HOSTILE + "b", "same": len(HOSTILE)}]
    page = run_page(data)
    assert "<script" not in page and str(escape(HOSTILE)) in page
    assert checked(page).text.count(" ".join(HOSTILE.split())) > 8


def test_a_run_under_way_has_a_page_too(pruned, tmp_path):
    shutil.copytree(pruned / "run", tmp_path / "half" / "run")
    (tmp_path / "half" / "run" / "result.json").unlink()
    html_report(tmp_path / "half", tmp_path / "page.html", None)
    assert "not finished: 3 blocks are done" in checked((tmp_path / "page.html").read_text()).text


def test_samples_are_what_both_models_say(pruned, llama_folder):
    asked = SampleRequest(("w5 w9", "w100"), 6, "cpu")
    (first, second), page = html_report(pruned, None, asked).data["samples"], (pruned / "report.html").read_text()
    again = html_report(pruned, None, SampleRequest(("w100",), 6, "cpu")).data["samples"]
    assert again == [second] and first["prompt"] == "w5 w9"
    for sample in (first, second):
        same = sample["same"]
        assert sample["dense"][:same] == sample["compressed"][:same]
        assert sample["dense"][same : same + 1] != sample["compressed"][same : same + 1] or same == len(sample["dense"])
    text = checked(page).text.replace(" ", "")
    assert all(each[kind].replace(" ", "") in text for each in (first, second) for kind in ("dense", "compressed"))


def test_what_cannot_be_meant_is_refused(pruned, swept, tmp_path):
    for path, out, samples, words in (
        (tmp_path, None, None, "holds no run"),
        (pruned, tmp_path / "none" / "a.html", None, "there is no folder"),
        (swept, None, SampleRequest(), "is a sweep"),
    ):
        with pytest.raises(InputError, match=words):
            html_report(path, out, samples)
    shutil.copytree(pruned / "run", tmp_path / "run")
    with pytest.raises(InputError, match="samples take the checkpoint"):
        html_report(tmp_path, None, SampleRequest())


def test_the_page_of_a_sweep_has_a_row_a_run(swept):
    data = html_report(swept, None, None).data
    page = checked((swept / "report.html").read_text())
    assert data["common"] == ["target.group_size=32"] and data["runs"][0]["name"] == "wanda+rtn"
    for row in data["runs"]:
        assert row["name"] in page.text and f"{row['perplexity']:.2f}" in page.text
        assert f'pruner = "{row["pruner"]}"' in row["recipe"]
        assert f'pattern = "{row["pattern"]}"' in row["recipe"]
    assert sum(row["best"] for row in data["runs"]) >= 1
    assert page.tags.count("details") == 4


def test_a_failed_run_has_its_line_in_the_table(swept):
    data = sweep_data(swept)
    figures = ("perplexity", "ratio", "compressed_bytes", "seconds")
    failed = {key: value for key, value in data["runs"][0].items() if key not in figures}
    data["runs"][0] = failed | {"failed": HOSTILE, "best": False}
    page = sweep_page(data)
    assert "<script" not in page and "failed: <script>" in checked(page).text


def test_checkpoints_of_one_size_have_no_plot_against_size(swept):
    data = sweep_data(swept)
    for step, drawn in ((0, False), (100_000, True)):
        runs = [row | {"compressed_bytes": 300_000 + step * index} for index, row in enumerate(data["runs"])]
        assert (size_plot(data | {"runs": runs}) is not None) == drawn
        assert ("All checkpoints are of one size" in checked(sweep_page(data | {"runs": runs})).text) != drawn


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(places):
    best = frontier([{"compressed_bytes": a, "perplexity": b} for a, b in places])
    for index, (a, b) in enumerate(places):
        beaten = any((c <= a and d < b) or (c < a and d <= b) for c, d in places)
        assert (index in best) is not beaten


@given(
    st.lists(st.sampled_from("abc"), min_size=1), st.lists(st.lists(st.sampled_from("defg"), unique=True), min_size=2)
)
def test_short_names_and_what_they_share_say_the_setting(shared, own):
    settings = ["x:" + ",".join(dict.fromkeys([*shared, *each])) for each in own]
    common, names = short_names(settings)
    for setting in settings:
        pieces = setting.replace(":", ",").split(",")
        assert set(pieces) == set(re.split("[:,] ?", names[setting])) | set(common)
    assert len(set(names.values())) == len(set(settings))


def test_layers_stand_in_their_block_and_experts_are_one_kind():
    assert place("model.layers.12.mlp.down_proj") == {
        "layer": "model.layers.12.mlp.down_proj", "block": 12, "kind": "mlp.down_proj"
    }  # fmt: skip
    assert place("model.layers.3.mlp.experts.gate_up_proj.7")["kind"] == "mlp.experts.gate_up_proj"
    assert place("model.layers.3.mlp.experts.7.w1")["kind"] == "mlp.experts.*.w1"
    assert place("decoder.layers.3.fc1")["kind"] == "fc1"
    assert place("lm_head") == {"layer": "lm_head", "block": None, "kind": "lm_head"}
    assert short_kinds(["attn.proj", "mlp.proj", "mlp.up"]) == ["attn.proj", "mlp.proj", "up"]
    step = {"step": "quantize", "method": "rtn", "bits": 4.0, "density": 1.0, "seconds": 0.0}
    experts = [place(f"m.layers.0.mlp.experts.{i}.w1") | {"steps": [step | {"error": i / 10}]} for i in range(3)]
    assert [(row["more"], row["error"]) for row in layer_rows(experts)] == [(2, pytest.approx(0.1))]


def test_figures_are_left_out_where_there_is_nothing_to_see():
    step = {"step": "quantize", "method": "rtn", "bits": 4.0, "density": 1.0, "error": 0.0, "seconds": 0.0}
    same = [place(f"model.layers.{i}.mlp.up_proj") | {"steps": [step]} for i in range(4)]
    assert error_plot(same) is None and spread_plot(same) is None
    same[0]["steps"] = [step | {"bits": 2.0, "error": 0.1}]
    assert error_plot(same) is not None and "bits a weight" in spread_plot(same).wide.lower()


def test_steps_trained_twice_after_a_kill_count_once():
    lines = [{"event": "train", "method": "lrec", "step": s, "loss": loss} for s, loss in ((1, 3), (2, 2), (2, 1))]
    end = {"event": "recovered", "method": "lrec", "steps": 2, "loss_before": 3, "loss_after": 1, "time": 0}
    found = trainings([*lines, end, *lines[:1]])
    assert [[point["loss"] for point in each["points"]] for each in found] == [[3, 1], [3]]
    assert found[0]["loss_after"] == 1 and "loss_after" not in found[1]


def test_names_are_listed_as_in_a_sentence():
    assert [listed(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_time_is_all_there(pruned):
    data = run_data(pruned)
    rows = times(data["seconds"], data["result"] | {"seconds": 1000.0})
    assert sum(row["value"] for row in rows if not row["part"]) == pytest.approx(1000.0, abs=1)
    assert max(row["share"] for row in rows) == 1 and len(tiles(data)) == 4


PROBE = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<iframe id="frame" style="border: 0" width="{width}" height="800" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inside = document.getElementById("frame").contentDocument, root = inside.documentElement;
  const seen = [...inside.querySelectorAll("svg")].filter(each => each.getBoundingClientRect().width > 0);
  const wide = [...inside.querySelectorAll("body *")].filter(each => !each.closest(".scroll, pre, svg"))
    .filter(each => each.getBoundingClientRect().right > root.clientWidth).map(each => each.outerHTML);
  const texts = seen.flatMap(each => [...each.querySelectorAll("text")]);
  document.body.innerHTML = "<pre>" + JSON.stringify({{
    beyond: root.scrollWidth - root.clientWidth, plots: seen.length, wide: wide,
    smallest: Math.min(...texts.map(each => each.getBoundingClientRect().height)),
    paper: getComputedStyle(inside.body).backgroundColor, ink: getComputedStyle(inside.body).color}}) + "</pre>";
}};
</script>"""


def seen_in_a_browser(page, width, tmp_path, *flags):
    """What the page looks like at a width in pixels."""
    file = tmp_path / "probe.html"
    file.write_text(PROBE.format(width=width, page=html.escape(page)))
    line = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/profile",
    ]
    done = subprocess.run(
        [*line, *flags, "--virtual-time-budget=5000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))


def lightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_pages_fit_a_phone_and_a_desk_without_a_word_on_the_console(kind, pruned, swept, tmp_path):
    path = pruned if kind == "run" else swept
    html_report(path, tmp_path / "page.html", None)
    page = (tmp_path / "page.html").read_text().replace("<details", "<details open")
    plots = checked(page).tags.count("svg") // 2
    for width in (390, 1280):
        found = seen_in_a_browser(page, width, tmp_path)
        assert found["beyond"] == 0 and found["wide"] == []
        assert found["plots"] == plots > 0 and found["smallest"] >= 10
    schemes = [f"--blink-settings=preferredColorScheme={scheme}" for scheme in (0, 1)]
    dark, light = (seen_in_a_browser(page, 390, tmp_path, scheme) for scheme in schemes)
    assert lightness(dark["paper"]) < 0.2 < 0.8 < lightness(dark["ink"])
    assert lightness(light["ink"]) < 0.2 < 0.8 < lightness(light["paper"])
