"""Other tools' logs and dumps become runs: `import_run`, and one file per format.

Data flow: paths → `formats.recognise` (which format lies there) → its reader (`steps.ImportedStep`, one per optimizer
step, under the framework's own names) → `writing` (names of `names`, tokens and sequences through `Recorder`) → a run
folder like any other, with what can and cannot be diagnosed from it (`diagnostics`) in its event `imported`.
"""

from __future__ import annotations

from collectors.importers.formats import FORMATS
from collectors.importers.writing import Imported, import_run

__all__ = ["FORMATS", "Imported", "import_run"]
