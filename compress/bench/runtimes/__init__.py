"""`compress bench runtimes`: one checkpoint in every runtime it can be exported to, beside ours."""
