"""The errors that whoever runs the program can mend."""


class UserError(Exception):
  """Something outside the program is wrong; the message names it and the fix.

  `status` is the exit status of the program: 2 if the command cannot run as it was given, 1 if a
  run needs somebody to look after it.
  """

  status = 2
