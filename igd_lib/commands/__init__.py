"""The subcommands of `igd`, by what they are about; `igd_lib.__main__` puts them together.

Each imports the library when it runs: `igd doctor` has to work where a package is missing or broken.
"""
