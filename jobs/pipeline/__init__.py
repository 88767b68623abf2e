"""The stages of a run: what each is made from, what it does, and what it says of itself.

`job` is what they all know; `data`, `training` and `export` have the stages, in their order;
`results` writes what is told of them all, `published` knows a run that is done already.
"""
