"""Makes the projects that lake.toml names and the database does not have; run in the vault by `millpond up`.

python -m millpond.hub.workspace.projects GATEWAY.toml PROJECTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from millpond.hub.database import open_database
from millpond.hub.policy import read_policy
from millpond.hub.projects import Projects
from millpond.hub.settings import read_settings
from millpond.hub.workspace.up_config import UpProject
from millpond.store.errors import MillpondError
from millpond.store.lake import open_lake


def make_projects(settings_file: Path, wanted: dict[str, UpProject]) -> None:
    """Make what is missing; what is there already keeps its roles and runs, and gets those that it lacks."""
    settings = read_settings(settings_file)
    policy = read_policy(settings.policy)
    lake = open_lake(settings.lake, create=True)
    engine = open_database(settings.database)
    projects = Projects(engine)
    for name, project in wanted.items():
        for model in project.models:
            policy.model(model)
        if projects.role(name, project.owner) is None:
            projects.create(name, models=project.models, by=project.owner)
        for user, role in project.members.items():
            if projects.role(name, user) is None:
                projects.set_role(name, user, role, by=project.owner, admin=True)
        held = {one.name for one in projects.held(name, "run")}
        for shown, run in project.runs.items():
            if shown not in held and run in lake:
                projects.hold(name, "run", shown, run, model=project.models[0], detail={"prompts": project.prompts})
    engine.dispose()


def main() -> int:
    """Make them; returns the exit code."""
    try:
        given = json.loads(Path(sys.argv[2]).read_text())
        make_projects(Path(sys.argv[1]), {name: UpProject.model_validate(value) for name, value in given.items()})
    except MillpondError as error:
        print(f"projects: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
