"""The top of the page: what became of each run, in words, with the evidence and what to try."""

from collections.abc import Sequence
from dataclasses import dataclass

from vmf_pretrain.config.resume import resume_command
from vmf_pretrain.report.page.markup import Html, name, table, text
from vmf_pretrain.report.page.run_data import CRASH, RunData
from vmf_pretrain.report.summary import comparison
from vmf_pretrain.report.verdict import verdict

Runs = Sequence[RunData]

FINISHED, FAILED = "finished", "failed"
GOING, KILLED, UNSEEN, LOST = "still going", "killed", "perhaps still going", "not finished"  # of runs that say no end
MOST_TRACEBACK = 20_000  # letters of a crash.txt that are shown


@dataclass(frozen=True)
class Judged:
    """A verdict, as the page shows it.

    Attributes:
        tone: "good", "bad" or "open".
        words: what it is.
        evidence, advice: sentences.
    """

    tone: str
    words: str
    evidence: Sequence[str] = ()
    advice: Sequence[str] = ()


def state_of(run: RunData) -> str:
    """Whether the run has ended, and how; of one that has not said so, whether its process still runs."""
    end, holder = run.end, run.holder
    if end is not None:
        return str(end.get("how", LOST))
    if run.summary is not None and not run.starts:
        return FINISHED
    if holder is None:
        return LOST
    return KILLED if holder.dead else GOING if holder.seen else UNSEEN


def judged(run: RunData) -> Judged:
    """What the run's figures mean."""
    if run.config is None:
        return Judged("open", "Not judged: this version cannot read the run's settings.", (run.unfit,))
    found = verdict(run.records, run.config)
    tone = "bad" if found.fault else "good" if found.kind == "alive" else "open"
    return Judged(tone, found.words, found.evidence, found.advice)


def headline(runs: Runs) -> Html:
    """The name of the run, or of the runs, and what they are in a line."""
    if len(runs) > 1:
        return Html(f"<h1>{len(runs)} runs side by side</h1><p class='sub'>vmf-pretrain report</p>")
    (run,) = runs
    backbone = "" if run.config is None else f"{run.config.backbone.name} · "
    seed = "" if run.config is None else f"seed {run.config.seed} · "
    line = f"{run.method} · {backbone}{seed}{run.step:,} steps · {state_of(run)}"
    return Html(f"<h1>{name(run.name)}</h1><p class='sub'>vmf-pretrain report · {text(line)}</p>")


def verdicts(runs: Runs) -> Html:
    """The verdict of each run; of several, first all of them in a table."""
    parts = []
    if len(runs) > 1:
        rows = [[run.name, run.method, state_of(run), f"{run.step:,}", judged(run).words] for run in runs]
        head = ["run", "method", "state", "steps", "verdict"]
        parts.append(table(head, rows, "All runs", numbers=False))
    return Html("".join([*parts, *(_verdict(run, several=len(runs) > 1) for run in runs)]))


def _verdict(run: RunData, *, several: bool) -> Html:
    found = judged(run)
    title = f"<h3>{name(run.name)}</h3>" if several else ""
    lists = "".join(
        f"<h4>{called}</h4><ul>{''.join(f'<li>{text(one)}</li>' for one in sentences)}</ul>"
        for called, sentences in (("Evidence", found.evidence), ("What to try", found.advice))
        if sentences
    )
    words = f'<p class="words">{text(found.words)}</p>'
    return Html(
        f'<div class="verdict {found.tone}">{title}{_ending(run)}{words}{lists}{_warnings(run)}{_agreement(run)}</div>'
    )


def _ending(run: RunData) -> str:
    """What a person must know of a run that did not come to its end."""
    state, end = state_of(run), run.end
    if state == FINISHED:
        return ""
    if end is None:
        said = _unended(run, state)
    else:
        done = "failed" if state == FAILED else "was stopped"
        said = f"The run {done} after step {int(end.get('step', run.step)):,}: {end.get('reason') or 'no reason was given'}"
    return f'<p class="ending">{text(said)}</p>{_traceback(run) if state == FAILED else ""}'


def _unended(run: RunData, state: str) -> str:
    """What is known of a run that has not said how it ended."""
    at, holder = f"step {run.step:,}", run.holder
    on = f"Go on with: {resume_command(run.folder.path)}"
    process = "" if holder is None else f"process {holder.pid} on {holder.host}"
    if state == GOING:
        return f"The run is still going: {process} has reached {at}."
    if state == UNSEEN:
        return f"The run has reached {at}. Whether {process} still runs cannot be seen from here."
    if state == KILLED:
        return f"The run was killed or lost at {at}: {process} has ended and not said how. {on}"
    return f"The run has reached {at} and has not said that it ended, and no process has its folder. {on}"


def _traceback(run: RunData) -> str:
    """Where the program failed, as the end of the run says; of an earlier version's run as its crash.txt has it."""
    end, path = run.end or {}, run.folder.path / CRASH
    if "traceback" not in end and path.is_file():
        said = path.read_text(encoding="utf-8", errors="replace")[-MOST_TRACEBACK:]
    else:
        said = str(end.get("traceback") or "")
    return f"<details><summary>Traceback</summary><pre tabindex='0'>{text(said)}</pre></details>" if said else ""


def _warnings(run: RunData) -> str:
    """What the run warned of while it went, as its metrics have it."""
    said = [record for record in run.records if isinstance(record.get("warning"), str)]
    lines = [f"step {record['step']:,}, {record['warning']}: {record.get('words', '')}" for record in said]
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<h4>Warnings during the run</h4><ul>{items}</ul>" if said else ""


def _agreement(run: RunData) -> str:
    """Whether the log and the summary agree."""
    summary = run.summary or {}
    if summary.get("mutual_information") is None or "mutual_information_agrees" not in summary:
        return ""
    return f"<p>{text(comparison(summary))}</p>"
