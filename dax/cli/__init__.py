"""The command `dax`: one thin file per command."""
