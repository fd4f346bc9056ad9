# gunicorn's defaults: only what the command line says
