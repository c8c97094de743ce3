"""``llmtailor demo``: train, crash in the middle of a save, resume, compare; on this machine, in about a minute.

    options  ->  run: child processes that train, a kill, a resume  ->  summarize  ->  table, plot, JSON

The parent (``run``, ``process``) imports neither torch nor transformers; the children (``child``, ``training``) do.
"""
