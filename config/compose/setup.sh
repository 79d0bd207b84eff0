#!/bin/sh
# Makes the secrets of compose.yaml, once: sudo sh config/compose/setup.sh [DIRECTORY]
#
# Of the containers, each with a user of its own, the group 10001 may read them, and nobody else; so it has to be run as root. LiveKit refuses a key
# file that everybody can read, and the daemon warns of secrets that everybody can read.
set -eu
umask 077

target=${1:-$(dirname "$0")/secrets}
group=10001
if [ "$(id -u)" != 0 ]; then
    echo "setup.sh: run it as root (sudo sh $0): the secrets are given to the group $group" >&2
    exit 1
fi
if [ -e "$target" ]; then
    echo "setup.sh: $target is there already, and nothing was changed. The databases have these passwords: to begin anew, remove it together with" \
        "the volumes (docker compose down --volumes), and with them everything that is stored." >&2
    exit 1
fi

hex() { head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
base64_of() { head -c "$1" /dev/urandom | base64 | tr -d '\n'; }

# In one step, in the end: a set that is not whole must not look like one.
new=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$new"' EXIT
cd "$new"

echo "APIcompose: $(hex 32)" > livekit-keys.yaml
hex 32 > postgres-password
hex 32 > postgres-synapse-password
hex 32 > postgres-delegate-password
hex 16 > grafana-password
base64_of 32 | tr '+/' '-_' > encryption-keys
echo "ed25519 a_$(hex 2) $(base64_of 32 | tr -d '=')" > synapse-signing-key

cat > synapse.yaml <<END
macaroon_secret_key: "$(hex 32)"
form_secret: "$(hex 32)"
registration_shared_secret: "$(hex 32)"
database:
  name: psycopg2
  args:
    host: postgres
    dbname: synapse
    user: synapse
    password: "$(cat postgres-synapse-password)"
    cp_min: 5
    cp_max: 10
END

# As \`sfu-delegate appservice --proxy-url http://sfu-delegate:8080\` would write it.
cat > registration.yaml <<END
id: sfu-delegate
url: null
as_token: "$(hex 32)"
hs_token: "$(hex 32)"
sender_localpart: sfu-delegate
rate_limited: false
namespaces:
  users:
    - exclusive: false
      regex: '@.*:matrix\.localhost\$'
  rooms: []
  aliases: []
io.element.msc4512.proxy_prefix: rtc/livekit
io.element.msc4512.proxy_url: http://sfu-delegate:8080
io.element.msc4502.scopes: ['urn:matrix:client:io.element.msc4502:rooms:is_joined']
END

chgrp "$group" . -- *
chmod 0440 -- *
chmod 0750 .
cd - > /dev/null
mv "$new" "$target"
trap - EXIT
echo "The secrets are in $target. Now: docker compose up --detach --wait"
