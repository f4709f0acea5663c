"""What is printed where there is no terminal: plain lines, seldom, without taking texts for markup."""

import pytest

from owlrec.ops import console
from owlrec.ops.console import note, progress, stage_header, table, warn


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_progress_prints_a_line_every_ten_seconds_at_most(clock, capsys):
    with progress("encode", 100, "texts") as advance:
        for _ in range(25):
            clock.now += 1
            advance(2, tokens=30)
    lines = capsys.readouterr().out.splitlines()
    figures = (("20/100", "300", "40.0 s left"), ("40/100", "600", "30.0 s left"), ("50/100", "750", "took 25.0 s"))
    for line, (done, tokens, time) in zip(lines, figures, strict=True):
        assert all(figure in line for figure in (f"{done} texts", "2.0 texts/s", f"{tokens} tokens", "30/s", time))


def test_progress_of_unknown_length_and_of_a_failing_block_ends_with_its_line(clock, capsys):
    def fail():
        with progress("read", None) as advance:
            clock.now += 3700
            advance(37_000)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(figure in last for figure in ("37,000 rows", "10 rows/s", "took 1 h 01 min"))


def test_progress_in_a_terminal_shows_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(console, "_console", lambda: console.Console(force_terminal=True, width=120))
    with progress("encode [bold]", 4, "texts") as advance:
        advance(4, tokens=10)
    out = capsys.readouterr().out
    assert "encode [bold]" in out
    assert "4/4 texts" in out
    assert "10 tokens" in out


def test_texts_are_printed_as_they_are(capsys):
    stage_header("publish [red]", "to [/] nowhere")
    note("title [bold]x[/bold] " + "long " * 40)
    warn("[link=x]")
    table("[b]", ["name", "[i]"], [["[red]a", 1234567], ["b", 2]])
    out = capsys.readouterr().out
    for text in (
        "== publish [red]: to [/] nowhere\n",
        "title [bold]x[/bold] long",
        "[link=x]",
        "[red]a",
        "1,234,567",
        "[i]",
    ):
        assert text in out
    assert sum("long" in line for line in out.splitlines()) == 1  # never folded: logs are searched by line


def test_numbers_read_well():
    cells = [console._cell(v) for v in (0.77712345, 12345.6, 12345, True, "x")]
    assert cells == ["0.7771", "12,346", "12,345", "True", "x"]
