"""What a study has downloaded, so that it deletes nothing else; kept in a file, as the study may be killed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from mui_callback.json_lines import append_line, whole_lines
from mui_callback.loading import ModelSource


@dataclass(frozen=True)
class Downloads:
    """Revisions that are in the cache of the hub because of a study: a line when one comes, a line when it goes."""

    file: Path

    def add(self, source: ModelSource, commit: str) -> None:
        """To be called before it is downloaded, where nothing of its weights is there.

        Raises:
            OSError: it cannot be written down.
        """
        self._write(source, commit, is_there=True)

    def delete(self, source: ModelSource) -> None:
        """Delete a revision from the cache if it is one of these, but not what other revisions have too.

        Raises:
            OSError: it cannot be deleted.
        """
        for commit in self._commits(source):
            with suppress(CacheNotFound):
                scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(commit).execute()
            self._write(source, commit, is_there=False)

    def _write(self, source: ModelSource, commit: str, *, is_there: bool) -> None:
        line = {"model": source.name, "revision": source.revision, "commit": commit, "is_there": is_there}
        append_line(self.file, line)

    def _commits(self, source: ModelSource) -> list[str]:
        """Those of a revision that are there; it may have moved on meanwhile."""
        commits: dict[str, bool] = {}
        for line in whole_lines(self.file):
            if (line["model"], line["revision"]) == (source.name, source.revision):
                commits[line["commit"]] = line["is_there"]
        return [commit for commit, is_there in commits.items() if is_there]
