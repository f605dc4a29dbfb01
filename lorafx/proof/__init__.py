"""Every kind of model behind one call, compared and timed: programs, modules, folders, exports.

Imports frontend and everything below.
"""
