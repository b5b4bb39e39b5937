//! Which servers see the token.

use gptq_hub::{RepoId, Request};
use gptq_hub_stand_in::{On, What};

use crate::support::{Place, REPO, all, assert_holds};

#[test]
fn the_token_goes_to_the_hub_with_every_request_and_never_to_the_storage() {
    let (place, files) = Place::with_model();
    let place = place.with_token("hf_read");
    place.server.world().repos.get_mut(REPO).unwrap().private = true;
    // Small files by way of a redirect within the hub.
    place.server.fault(On::Resolve, 100, What::Relative);
    assert_holds(&place.fetch(&all()).unwrap().folder, &files);
    let log = place.server.log();
    assert!(log.iter().any(|asked| asked.path.contains("resolve-cache")));
    assert!(log.iter().filter(|asked| asked.storage).count() >= 11);
    for asked in log {
        assert_eq!(asked.token.as_deref(), (!asked.storage).then_some("hf_read"), "{asked:?}");
        assert_eq!(asked.accept_encoding, None, "a storage that compresses ignores ranges");
    }
}

#[test]
fn a_repository_that_was_renamed_is_found_with_the_token() {
    let (place, files) = Place::with_model();
    let place = place.with_token("hf_read");
    {
        let mut world = place.server.world();
        let mut old = gptq_hub_stand_in::Repo::new();
        old.moved_to = Some(REPO.into());
        world.repos.insert("acme/old".into(), old);
        world.repos.get_mut(REPO).unwrap().private = true;
    }
    let old = RepoId::model("acme/old").unwrap();
    let commit = place.client.commit(&old, "main", &gptq_hub::silent).unwrap();
    assert_eq!(commit, place.server.world().repos[REPO].branches["main"]);
    let request = Request { repo: RepoId::model(REPO).unwrap(), ..all() };
    assert_holds(&place.fetch(&request).unwrap().folder, &files);
}

#[test]
fn a_redirect_that_does_not_say_what_lies_there_is_not_followed() {
    let (place, _) = Place::with_model();
    place.server.fault(On::Resolve, 100, What::NoLinkedEtag);
    let line = place.refusal(&all());
    assert!(line.contains("is redirected to without the hash of the file"), "{line}");
    assert!(place.server.log().iter().all(|asked| !asked.storage));
}
