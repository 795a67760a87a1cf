"""The pages of reviewers and administrators: the review queue, budgets over time, the audit log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa

from millpond.hub.answers import Review
from millpond.hub.body import BudgetLeft, ReleasedResult, Texts
from millpond.hub.pages.charts import bar_chart
from millpond.hub.pages.jobs import declared
from millpond.hub.pages.results import Layout, lay_out
from millpond.hub.pages.view import PER_PAGE, View
from millpond.hub.rules import REMEDIES
from millpond.hub.serving import Fixed, NotThere
from millpond.hub.tables import ACCOUNTS, ENTRIES
from millpond.hub.textcode import decode
from millpond.hub.views import AuditView, EvidenceView, ReviewQueue, audit_view
from millpond.store.errors import InvalidInput

_DECISIONS: Mapping[str, tuple[Literal["approved", "denied"], str]] = {
    "approve": ("approved", "Approved: the answer is released to whoever asks for it."),
    "refuse": ("denied", "Refused: it stays in the vault."),
}


def reviews(view: View) -> Fixed:
    """The answers that wait."""
    view.enter("review")
    found = view.gateway.answers.reviews(view.project, "waiting")
    queue = view.send(ReviewQueue(tuple((one.job, one.number) for one in found)))
    assert isinstance(queue, ReviewQueue)
    rows = [{"job": declared(view, job), "number": number} for job, number in queue.waiting]
    return view.show("reviews.html", here="Reviews", waiting=rows)


def review(view: View) -> Fixed:
    """Why an answer waits and its evidence, charged; its values only when they are asked for, charged as a release."""
    view.enter("review")
    return _review(view, _waiting(view))


def decide(view: View) -> Fixed:
    """Approve, refuse, or look at the payload. For browsers that logged in here: no token suffices."""
    view.enter("review")
    found, act = _waiting(view), view.call.body.get("do")
    if act == "view":
        kept, sent = view.gateway.look(view.call.who, view.project, found.job, found.number)
        body = view.take(sent)
        if isinstance(body, Texts):  # decoded here: what is shown is what was charged, and the dictionary
            limit = kept.question.specification["job"]["text_bytes"]
            texts = decode(body.coded, kept.result.evidence["rows"], view.gateway.text_model, limit)
            return _review(view, found, texts=texts)
        assert isinstance(body, ReleasedResult)
        return _review(view, found, result=lay_out(body.result))
    if act not in _DECISIONS:
        raise InvalidInput(f"there is nothing called {act!r} to do")
    decision, done = _DECISIONS[act]
    view.gateway.decide(view.call.who, view.project, found.job, found.number, decision)
    return _review(view, found, done=done)


def budget(view: View) -> Fixed:
    """What is left, charged; and what the user was charged week by week, which the user has received already."""
    left = view.ask("GET", "/p/{project}/budget")
    assert isinstance(left, BudgetLeft)
    now = datetime.now(UTC)
    weeks = [
        f"{year}-W{week:02}" for year, week, _ in ((now - timedelta(weeks=w)).isocalendar() for w in range(7, -1, -1))
    ]
    spent = []
    for model, charged in sorted(_charged(view).items()):
        counts = [charged.get(week, 0) for week in weeks]
        cap = view.gateway.policy.cap(model, "user_week")
        svg = bar_chart(
            counts,
            names=weeks,
            cap=cap if cap is not None and 20 * max(counts) > cap else None,
            title=f"Bytes of {model} charged to you by week",
            x_label="week",
            y_label="bytes",
        )
        spent.append({"name": model, "svg": svg, "weeks": list(zip(weeks, counts, strict=True)), "cap": cap})
    return view.show("budget.html", here="Budget", left=left, spent=spent)


def audit(view: View) -> Fixed:
    """Entries of the ledger, newest first; charged, since what was charged to others is news to an administrator."""
    last, _ = view.gateway.ledger.head()
    pages = max(-(-last // PER_PAGE), 1)
    page = view.page_number(pages)
    query = sa.select(ENTRIES.c.seq, ENTRIES.c.at, ENTRIES.c.kind, ENTRIES.c.detail).order_by(ENTRIES.c.seq.desc())
    top = last - (page - 1) * PER_PAGE
    with view.gateway.engine.execution_options(write=False).connect() as connection:
        rows = connection.execute(query.where(ENTRIES.c.seq <= top).limit(PER_PAGE)).all()
    shown = view.send(audit_view(last, [tuple(row) for row in rows]))
    assert isinstance(shown, AuditView)
    return view.show("audit.html", here="Audit", entries=shown.entries, page=page, pages=pages)


def _waiting(view: View) -> Review:
    job, number = view.call.params["job"], view.call.params["number"]
    found = view.gateway.answers.review(job, int(number)) if number.isdecimal() and len(number) < 7 else None
    if found is None or found.project != view.project or found.state != "waiting":
        raise NotThere(f"answer {number} does not wait")
    return found


def _review(
    view: View, found: Review, *, result: Layout | None = None, texts: Sequence[str] | None = None, done: str = ""
) -> Fixed:
    kept = view.gateway.answers.find(found.job, found.number)
    seen = view.send(EvidenceView.of(kept.evidence, kept.verdict), kept.models)
    assert isinstance(seen, EvidenceView)
    return view.show(
        "review.html",
        here="Reviews",
        job=declared(view, found.job),
        number=found.number,
        rules=[(rule.name.lower(), REMEDIES[rule]) for rule in seen.why()],
        evidence=[(name, _words(value)) for name, value in asdict(seen).items() if name != "rules"],
        result=result,
        texts=texts,
        done=done,
        mine=found.user == view.user,
    )


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"{one:,}" for one in value) or "none"
    return "not measured" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _charged(view: View) -> dict[str, dict[str, int]]:
    """By model of the project and week, the bytes charged to the user in all projects."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    models = view.gateway.projects.models(view.project)
    names = [ACCOUNTS.c.name.startswith(f"user_week:{model}:{view.user}/", autoescape=True) for model in models]
    query = sa.select(ACCOUNTS.c.name, ACCOUNTS.c.spent).where(sa.or_(*names))
    with view.gateway.engine.execution_options(write=False).connect() as connection:
        for name, spent in connection.execute(query):
            _, model, subject = name.split(":", 2)
            found[model][subject.rpartition("/")[2]] = spent
    return found
