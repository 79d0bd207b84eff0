#!/bin/sh
# Run by the PostgreSQL image when its volume is empty: a user and a database for Synapse, and for sfu-delegate.
# The passwords are read by psql itself: what stands in a command line, others can see.
set -eu
secrets=${SECRETS:-/run/secrets}
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 --username="${POSTGRES_USER:-postgres}" --dbname=postgres <<END
\\set synapse_password \`cat '$secrets/postgres-synapse-password'\`
\\set delegate_password \`cat '$secrets/postgres-delegate-password'\`
CREATE ROLE synapse LOGIN PASSWORD :'synapse_password';
CREATE DATABASE synapse OWNER synapse TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C';
CREATE ROLE sfu_delegate LOGIN PASSWORD :'delegate_password';
CREATE DATABASE sfu_delegate OWNER sfu_delegate TEMPLATE template0 ENCODING 'UTF8';
REVOKE CONNECT ON DATABASE synapse, sfu_delegate FROM PUBLIC;
END
