"""What a user writes, and how text becomes it.

`recipe` defines `Recipe` and its settings; `schedules` and `optimizer` are values that a recipe
holds. `resolve` finds a recipe by name, file or module; `overrides` applies `name=value` arguments
and YAML files to it, with `callspec` and `validation` reading the values. `affects` classifies the
settings. `scaffold` writes a recipe to start from; `package_data` finds data files of
installed packages.
"""
