"""Errors that the user of the program can fix."""


class UserError(Exception):
  """Something outside the program is wrong; the message names the problem and the fix.

  `status` is the exit status of the program: 2 if the command cannot run as given, 1 if a run needs
  attention.
  """

  status = 2
