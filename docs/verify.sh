#!/usr/bin/env bash
# Check a release without fedcompose: with bash, GNU coreutils and findutils, openssl and jq.
#
#   docs/verify.sh RELEASE ROOT_FINGERPRINT... [REVOCATIONS.json]     exit status 0: verified, 1: refused, 2: usage
#
# Roots -> federation.json -> coordinator's key -> model.sig -> every file -> each site's key, model.sig, files, limits
# and terms; as of the day on which the release was made, like `fedcompose verify`, less what the list takes back. Not
# checked: what is in tensors and settings, sizes, JSON that two readers read differently. docs/formats.md has the rest.
set -euo pipefail
export LC_ALL=C
[ $# -ge 2 ] || { sed -n 2,4p "$0" >&2; exit 2; }
release=$1 claims=$1/provenance.json work=$(mktemp -d)
shift
trap 'rm -rf "$work"' EXIT
refuse() { echo "REFUSED: $*" >&2; exit 1; }
digest() { sha256sum <"$1" | cut -d' ' -f1; }
decode() { base64 -d <<<"$1" >"$2" 2>&1 && [ "$(base64 -w0 "$2")" = "$1" ] || refuse 'not base64'; }

signed() {  # KEYID PEM SIGNATURE TYPE PAYLOAD: that key signed DSSE's encoding of type and payload
  local hash=-sha256
  decode "$2" "$work/pem"
  decode "$3" "$work/signature"
  [ "$(digest "$work/pem")" = "$1" ] || refuse "key $1 has another fingerprint"
  { printf 'DSSEv1 %d %s %d ' ${#4} "$4" "$(wc -c <"$5")"; cat "$5"; } >"$work/message"
  if [[ $(openssl pkey -pubin -in "$work/pem" -noout -text 2>&1) == *secp384r1* ]]; then hash=-sha384; fi
  openssl dgst $hash -verify "$work/pem" -signature "$work/signature" "$work/message" >"$work/log" 2>&1 ||
    refuse "this is not what key $1 signed"
}

vouched() {  # FILE KIND KEYID: that root signed the document in it, which lies decoded in $work/KIND
  read -r signature pem < <(jq -r --arg id "$3" --slurpfile file "$work/federation" '
    "\(.signatures[] | select(.keyid == $id).sig) \($file[0].roots[] | select(.keyid == $id).public_key | @base64)"' \
    "$1") || refuse "$3 is no root that signed $1"
  signed "$3" "$pem" "$signature" "application/vnd.fedcompose.$2.v1+json" "$work/$2"
}

folder() {  # DIR MEMBERS TIME: signed with a key of theirs that counted then, and its files are the ones signed
  local payload signature pem
  [ -z "$(find "$1" ! -type f ! -type d -o -type f -links +1 -o -type d -empty)" ] || refuse "a link, or nothing, in $1"
  read -r keyid payload signature < <(jq -r '.verificationMaterial.publicKey.hint as $keyid |
    .dsseEnvelope.payload as $payload | .dsseEnvelope.signatures[0].sig as $sig |
    select(. == {mediaType: "application/vnd.dev.sigstore.bundle.v0.3+json",
      verificationMaterial: {publicKey: {hint: $keyid}, tlogEntries: []}, dsseEnvelope: {payload: $payload,
      payloadType: "application/vnd.in-toto+json", signatures: [{$sig, keyid: ""}]}}) |
    "\($keyid) \($payload) \($sig)"' "$1/model.sig") || refuse "$1/model.sig has another shape"
  read -r id domain pem < <(jq -r --arg keyid "$keyid" --arg at "$3" --slurpfile list "$work/revocations" "[.$2"'[] |
    select((.status // "active") == "active") | {id, domain} + .keys[] | select(.keyid == $keyid and .not_before <= $at
    and $at < .not_after and all(.revoked, ($list[0].keys[] | select(.keyid == $keyid)); (.at // "never") > $at))][0] |
    "\(.id) \(.domain) \(.public_key | @base64)"' "$work/federation") || refuse "no key $keyid of $2 counted on $3"
  decode "$payload" "$work/statement"
  signed "$keyid" "$pem" "$signature" application/vnd.in-toto+json "$work/statement"
  (cd "$1" && find . -type f ! -path ./model.sig | cut -c3- | sort | xargs -rd '\n' sha256sum) >"$work/files"
  jq -r 'select(.predicateType == "https://model_signing/signature/v1.0") | .predicate.resources[] |
    select(.name | test("\\A[A-Za-z0-9_./-]+\\z")) | "\(.digest)  \(.name)"' "$work/statement" | sort -k2 |
    cmp -s - "$work/files" || refuse "the files in $1 are not those that were signed"
  jq -r '.subject[] | "\(.digest.sha256)  \(.name)"' "$1/provenance.json" | sort -k2 |
    cmp -s - <(grep -v '  provenance.json$' "$work/files") || refuse "$1/provenance.json is about other files"
}

decode "$(jq -r .payload "$release/federation.json")" "$work/federation"
jq '{federation, keys: [], releases: []}' "$work/federation" >"$work/revocations" || refuse 'no federation file'
if [ -f "${!#}" ]; then  # the list of what roots took back since; one of them is enough
  decode "$(jq -r .payload "${!#}")" "$work/revocations"
  vouched "${!#}" revocations "$(jq -r '.signatures[0].keyid' "${!#}")"
  set -- "${@:1:$#-1}"
fi
for root in "$@"; do vouched "$release/federation.json" federation "$root"; done
read -r made < <(jq -r --slurpfile file "$work/federation" --arg roots "$(printf '%s\n' "$@" | sort -u | grep -c .)" '
  .predicate.runDetails.metadata.finishedOn as $made | select($file[0] | .threshold <= ($roots | tonumber) and
  .issued <= $made and $made < .expires) | $made' "$claims") || refuse 'too few roots, or an expired federation file'
[[ $made < $(date -ud '5 minutes' +%FT%TZ) ]] || refuse "the release was made later than now, on $made"
folder "$release" coordinators "$made"
coordinator=$id hash=$(digest "$work/files")
jq -e --arg hash "$hash" --slurpfile file "$work/federation" 'all(.releases[]; .dirHash != $hash) and
  .federation == $file[0].federation' "$work/revocations" >"$work/log" || refuse 'a root withdrew it, or another list'
experts=$(jq -er --slurpfile composition "$release/composition.json" --slurpfile file "$work/federation" \
  --rawfile files "$work/files" --arg builder "urn:fedcompose:coordinator:$coordinator" '
  .predicate.buildDefinition as {externalParameters: {$federation}, resolvedDependencies: [$shared]} |
  $composition[0] as {$experts, $base} | select(.predicate.runDetails.builder.id == $builder and
    $shared.digest.dirHash == $base.dirHash and any($file[0].base_models[]; .dirHash == $base.dirHash) and
    $file[0].federation == $federation and all($files | split("\n")[]; .[66:] | test("\\A(|
      (composition|federation|provenance|evaluation)[.]json|router[.]safetensors|
      (attention|ingredients/[a-z0-9_-]+)/adapter_(config[.]json|model[.]safetensors)|
      ingredients/[a-z0-9_-]+/(model[.]sig|provenance[.]json|README[.]md))\\z"; "x"))) |
  .predicate.buildDefinition.resolvedDependencies[1:] |
  select(map([.name, .digest.dirHash]) == ($experts | map([.site, .dirHash]))) | [., $experts] | transpose[] |
  .[0].annotations as $seen | [$seen.receivedOn, .[1].site, .[1].domain, .[1].dirHash, $seen.omsPayloadSha256,
    $seen.keyid, $seen.sequence, $base.dirHash, $federation] | join(" ")' "$claims") ||
  refuse 'provenance, composition, files and federation file do not agree'
[ "$(cut -d' ' -f2 <<<"$experts" | sort)" = "$(ls "$release/ingredients")" ] || refuse 'other experts than ingredients'
while read -r received expected; do
  site=$release/ingredients/${expected%% *}
  [[ ! $made < $received ]] || refuse "$site was received after the release was made"
  folder "$site" sites "$received"
  found=$(jq -er --arg at "$received" --arg signed "$(digest "$work/files") $(digest "$work/statement") $keyid" \
    --arg made "$made" --arg hub "$coordinator" '.predicate.buildDefinition |
    .resolvedDependencies[0].digest.dirHash as $base | .externalParameters | .audit.verdict as $audit |
    select($at < .expires and (.use | . == null or ($made < .expires and any(.recipients[]; . == $hub))) and
      (.limits.requireAudit // "none" | IN("none", $audit, if $audit == "pass" then "warn" else empty end)) and
      (.limits.maxEpsilon // infinite) >= (.dp.epsilon // infinite)) |
    [.site, .domain, $signed, .sequence, $base, .federation] | join(" ")' "$site/provenance.json") ||
    refuse "$site was received too late, or its site does not let $coordinator use it"
  [[ $found = "$expected" && $found = "$id $domain "* ]] || refuse "$site is another contribution than the release says"
done <<<"$experts"
jq -es 'map(.predicate.buildDefinition.externalParameters.call // empty) | group_by(.id) |
  all(.[]; (map(.sha256) | unique | length) == 1)' "$release"/ingredients/*/provenance.json >"$work/log" ||
  refuse 'the experts answer different calls of one name'
echo "Verified: signed by $coordinator, made of $(wc -l <<<"$experts") experts on $made, dirHash $hash"
