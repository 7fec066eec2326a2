"""Files and objects at URLs, reached through fsspec, which is imported only when it is used.

locations       URLs: which text is one, its file system, the package that it needs
requests        bounded attempts, and what a failed one means
object_store    the objects below one URL: read, write, list and delete them
"""
